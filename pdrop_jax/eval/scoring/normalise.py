"""Normalisation of answers as in the VQA evaluation.

The tables come from VQA (Antol et al., 2015), and so do the oddities, which are part of all published numbers. Entries
with a capital letter are omitted because words are compared in lower case.
"""

import re

ARTICLES = {"a", "an", "the"}
NUMBERS = {"none": "0"} | {
    word: str(n)
    for n, word in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"))
}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
EVALAI_COMMA, VQA_COMMA = r"\d,+\d", r"\d,\d"  # the two evaluations differ for "1,,2"
MOST_FULL_STOPS = 32  # the original passes the flag re.UNICODE, which is 32, as the count of re.sub
CONTRACTED = """
'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
# Maps each word without one of its apostrophes to the word. "somebody'd" alone loses its apostrophe.
CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word for word in CONTRACTED.split() for at, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}


def without_punctuation(text: str, comma: str = EVALAI_COMMA) -> str:
    """Replaces each punctuation mark by a space, or removes it if a space is next to it anywhere in the text.

    All marks are removed if a comma stands between digits, by the regular expression ``comma``. A full stop is removed
    unless a digit follows. "1,000-2" becomes "10002", "t-shirt" "t shirt", "hello - you" "hello  you".
    """
    joined = re.search(comma, text) is not None
    result = text
    for mark in PUNCTUATION:
        result = result.replace(mark, "" if joined or f"{mark} " in text or f" {mark}" in text else " ")
    return re.sub(r"\.(?!\d)", "", result, count=MOST_FULL_STOPS)


def without_articles(text: str) -> str:
    """Lower case, numbers up to ten as digits, articles removed, apostrophes of contractions added, single spaces."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def evalai(text: str) -> str:
    """EvalAI's normalisation, used for TextVQA and LLaVA's VQAv2: "The dog's two toys," becomes "dog 's 2 toys"."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return without_articles(without_punctuation(text))
