"""What GPUs can do at most, to say what share of it a training run uses.

Dense bfloat16 products with sums in float32, without the sparsity that data sheets count double.
Source: NVIDIA's data sheets of each product.
"""

PEAKS = {  # part of the name that torch.cuda.get_device_name() gives -> operations per second; the first that fits
    "B200": 2250e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops(name):
    """The most operations per second of a device: float, or None for one that the table does not know.

    Args:
      name: str, from torch.cuda.get_device_name(), or a key of PEAKS.
    """
    return next((peak for part, peak in PEAKS.items() if part in name), None)
