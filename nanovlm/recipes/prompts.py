"""How Lynx asks: several prompts for each task, one of which is drawn for every record.

Lynx, arXiv:2307.02469, Sec. 2.3: at least three prompts were written for each task, and GPT-4 continued them on the meta
prompt "Here are some instructions that define a visual-language task. Continue to write 15 instructions with the same
meaning: 1) PROMPT1; 2) PROMPT2; 3) PROMPT3;". Published is one prompt of each data set (Table 13): it comes first in each
pool. The others are ours; `python -m nanovlm.vlit` asks a language model for more with that meta prompt.
"""

import re

SLOT = re.compile(r"\[[A-Z]+\](?: Options: \[OPTIONS\])?")  # a file writes a question and its options as one text
QUESTIONS = (
    "[QUESTION] Give a short answer.",
    "[QUESTION] Answer with a word or a short phrase.",
    "[QUESTION] Reply briefly.",
    "Answer the question about the image in a few words. [QUESTION]",
)
POOLS = (  # the first of each as Table 13 has it
    QUESTIONS,
    ("Describe the image briefly.", "Give a short description of the image.", "What is in the image? Describe it in one "
     "sentence.", "Write a brief caption for the image."),
    ("Describe the image.", "What does the image show?", "Tell me what can be seen in the image.", "Write a caption for the image."),
    ("Write a relevant description to pair with the image.", "Write a text that goes with the image.",
     "Which description would accompany this image?", "Give a text that fits the image."),
    ("Describe the image shortly by reading the texts.", "Describe the image briefly and take the words in it into account.",
     "Read the texts in the image and give a short description of it.", "What does the image show, and what do its texts say?"),
    ("Describe the person in the image.", "What does the person in the image look like?",
     "Give a description of the person who is shown.", "Describe the looks and clothes of the person."),
    ("Describe the key elements in the image.", "What are the main elements of the image?",
     "Describe what matters most in the image.", "Name and describe the key parts of the image."),
    ("Describe the image in detail.", "Give a detailed description of the image.", "Describe everything that the image shows.",
     "Write down what can be seen in the image, with all details."),
    ("Answer the question briefly by reading the webpage. [QUESTION]", "Read the webpage and answer in a few words. [QUESTION]",
     "[QUESTION] Find the answer on the webpage and reply briefly.", "What does the webpage say? [QUESTION] Answer shortly."),
    ("Answer the question shortly by reading the texts. [QUESTION]", "Read the texts in the image and answer. [QUESTION]",
     "[QUESTION] Answer briefly, the texts in the image tell.", "Use the words in the image for a short answer. [QUESTION]"),
    ("Where is this? Answer with a place name.", "What kind of place is shown? Name it.", "Name the place in the image.",
     "Which place is this? Reply with its name."),
    ("What is in the image? Answer with its name.", "Name the object in the image.", "What is this? Reply with its name.",
     "Which object is shown? Give its name."),
    ("Does the image semantically entail the following text? Text: [HYPOTHESIS] Options: 1. neutral 2. entailment 3. contradiction",
     "Decide how the image relates to the text. Text: [HYPOTHESIS] Options: 1. neutral 2. entailment 3. contradiction",
     "Text: [HYPOTHESIS] Does the image support it? Options: 1. neutral 2. entailment 3. contradiction"),
    ("Choose the correct answer. Question: [QUESTION] Options: [OPTIONS]", "Which option is right? Question: [QUESTION] Options: "
     "[OPTIONS]", "Select the answer that fits the image. Question: [QUESTION] Options: [OPTIONS]"),
    ("What food is it?", "Which food is shown? Name it.", "Name the dish in the image.", "What is the food in the image called?"),
    ("Given the claim \"[HYPOTHESIS]\", is it True or False?", "Is the claim \"[HYPOTHESIS]\" True or False?",
     "Look at the images. \"[HYPOTHESIS]\" Answer with True or False."),
    ("What artistic movement or style does this art picture belong to? Answer with a style name.",
     "Name the artistic style of this picture.", "Which artistic movement is this work of? Reply with its name.",
     "In which style was this painted? Answer with a style name."),
    ("What is the person doing? Answer shortly.", "Name what the person is doing.", "Which action does the person perform? Answer "
     "briefly.", "What activity is shown? Give a short answer."),
    ("What is the time now? Give a short answer.", "Which time does the clock show? Answer shortly.", "Read the time.",
     "Tell me the time that is shown, in a few words."),
    ("Is \"[MEME]\" a hateful meme? Answer with Yes or No.", "The meme says \"[MEME]\". Is it hateful? Answer with Yes or No.",
     "Does the meme \"[MEME]\" attack people? Answer with Yes or No."),
    ("Describe the video shortly.", "Give a short description of the video.", "What happens in the video? Answer in one sentence.",
     "Write a brief caption for the video."),
    ("Describe the video in detail.", "Give a detailed description of the video.", "Tell all that happens in the video.",
     "Write down what the video shows, step by step."),
)  # fmt: skip
AS_THEY_ARE = ("[QUESTION]", "[INSTRUCTION]", "[DIALOG]")  # the data set's own words


def lynx_prompts(datasets):
    """Prompts in the form that datasets.py takes.

    Args:
      datasets: list of {"name", "kind", "prompt"}, the prompt as Table 13 prints it.
    Returns: dict name -> tuple of prompts; without the data sets that are used as they are.
    """
    pools = {pool[0]: pool for pool in POOLS}
    found = {}
    for data in datasets:
        if data["prompt"] not in AS_THEY_ARE:
            pool = [prompt.replace("the image", "the video") if data["kind"].startswith("video") else prompt
                    for prompt in pools[data["prompt"]]]
            found[data["name"]] = tuple(SLOT.sub(slot, prompt) for prompt in pool)
    return found


def slot(match):
    """What stands in our prompts for a place in brackets; a question alone gets its mark."""
    return "{question?}" if match[0] == "[QUESTION]" else "{question}"
