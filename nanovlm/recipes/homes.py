"""Where the papers' data sets live. Addresses and sizes are for people; nothing here is fetched.

Examples are as the papers count them: Lynx's in its Table 12 (lynx_mixture.json), others here. Addresses were written
down from the data sets' own papers and pages and may have moved.
"""

import json
from pathlib import Path

LYNX = {data["name"]: data["size"] for data in json.loads((Path(__file__).parent / "lynx_mixture.json").read_text())["datasets"]}
LLAVA = "huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K"
HOMES = {  # name in a mixture -> page
    "A-OKVQA": "github.com/allenai/aokvqa",
    "Alpaca GPT4": "github.com/Instruction-Tuning-with-GPT-4/GPT-4-LLM",
    "Baize": "github.com/project-baize/baize-chatbot",
    "BlipCapFilt": "github.com/salesforce/BLIP",
    "CC12M": "github.com/google-research-datasets/conceptual-12m",
    "CC3M": "ai.google.com/research/ConceptualCaptions",
    "COCO": "cocodataset.org",
    "COCO Caption": "cocodataset.org",
    "COYO": "github.com/kakaobrain/coyo-dataset",
    "CUHK-PEDES": "github.com/ShuangLI59/Person-Search-with-Natural-Language-Description",
    "DataComp": "datacomp.ai",
    "Flan V2": "github.com/google-research/FLAN",
    "Flickr30k": "shannon.cs.illinois.edu/DenotationGraph",
    "GQA": "cs.stanford.edu/people/dorarad/gqa",
    "HatefulMemes": "hatefulmemeschallenge.com",
    "IAPR TC-12": "imageclef.org/photodata",
    "ImageNet1K": "image-net.org",
    "InViG": "openivg.github.io",
    "LAION OIG Small": "huggingface.co/datasets/laion/OIG",
    "LAION-en": "laion.ai",
    "LLaVA Caption": LLAVA,
    "LLaVA Dialog": LLAVA,
    "LLaVA Instruction": LLAVA,
    "LLaVA Reasoning": LLAVA,
    "LLaVA-instruct-150K": LLAVA,
    "MSR-VTT-QA": "github.com/xudejing/video-question-answering",
    "MSVD-QA": "github.com/xudejing/video-question-answering",
    "MiniGPT4 IFT": "huggingface.co/datasets/Vision-CAIR/cc_sbu_align",
    "NLVR2": "lil.nlp.cornell.edu/nlvr",
    "NeXT-QA": "github.com/doc-doc/NExT-QA",
    "OCR-VQA": "ocr-vqa.github.io",
    "OCRVQA": "ocr-vqa.github.io",
    "OKVQA": "okvqa.allenai.org",
    "Places365": "places2.csail.mit.edu",
    "RefCOCO": "github.com/lichengunc/refer",
    "SBU": "cs.rice.edu/~vicente/sbucaptions",
    "SNLI-VE": "github.com/necla-ml/SNLI-VE",
    "STVQA": "rrc.cvc.uab.es/?ch=11",
    "ShareGPT": "huggingface.co/datasets/anon8231489123/ShareGPT_Vicuna_unfiltered",
    "ShareGPT-80K": "huggingface.co/datasets/anon8231489123/ShareGPT_Vicuna_unfiltered",
    "SlimOrca": "huggingface.co/datasets/Open-Orca/SlimOrca",
    "SthV2": "developer.qualcomm.com/software/ai-datasets/something-something",
    "TDIUC": "kushalkafle.com/projects/tdiuc",
    "TextCaps": "textvqa.org/textcaps",
    "TextVQA": "textvqa.org",
    "Unnatural Instruction": "github.com/orhonovich/unnatural-instructions",
    "VGQA": "homes.cs.washington.edu/~ranjay/visualgenome",
    "VQAv2": "visualqa.org",
    "Visual Genome Caption": "homes.cs.washington.edu/~ranjay/visualgenome",
    "VisualGenome": "homes.cs.washington.edu/~ranjay/visualgenome",
    "Visual7W": "ai.stanford.edu/~yukez/visual7w",
    "Visual7W Multi-choice": "ai.stanford.edu/~yukez/visual7w",
    "VizWiz": "vizwiz.org",
    "WebSRC": "x-lance.github.io/WebSRC",
    "WikiArt": "github.com/cs-chan/ArtGAN",
    "blip2_captions_129m": "COCO, Visual Genome, CC3M, CC12M, SBU and 115M pictures of LAION with CapFilt's captions (BLIP-2, Sec. 3.4)",
    "blip_laion_cc_sbu_558k": "huggingface.co/datasets/liuhaotian/LLaVA-Pretrain",
    "llava_instruct_158k": LLAVA,
    "llava_mix_665k": f"{LLAVA}, llava_v1_5_mix665k.json",
    "llava_pretrain_558k": "huggingface.co/datasets/liuhaotian/LLaVA-Pretrain",
    "llava_v1_5_mix665k": f"{LLAVA}, llava_v1_5_mix665k.json",
    "vlit_158k": "any of the sets that the review compares, of LLaVA's size; `python -m nanovlm.vlit` makes one",
}
SIZES = {
    "blip2_captions_129m": "129M", "blip_laion_cc_sbu_558k": "558K", "llava_instruct_158k": "158K", "llava_mix_665k": "665K",
    "llava_pretrain_558k": "558K", "llava_v1_5_mix665k": "665K", "vlit_158k": "158K", "ShareGPT": "80K", "ShareGPT-80K": "80K",
    "LLaVA-instruct-150K": "158K",
} | {name: size for name, size in LYNX.items() if size}  # fmt: skip
UNKNOWN = "its paper names no source"


def home(name):
    """Examples and page of a data set: str, for a list of what to fetch."""
    return f"{SIZES.get(name, '?'):>7}  {HOMES.get(name, UNKNOWN)}"
