"""Text metrics, kept free of dependencies; tests/test_ruler.py holds them to rouge-score and sacrebleu."""
import math
import re
from collections import Counter


def rouge_l(candidate, references):
    """ROUGE-L F1 in 0..1 (Lin 2004), the best over the references; tokens as in rouge-score without stemming."""
    a, best = re.findall(r"[a-z0-9]+", candidate.lower()), 0.0
    for reference in references:
        b, where, row = re.findall(r"[a-z0-9]+", reference.lower()), {}, 0
        for i, word in enumerate(a):
            where[word] = where.get(word, 0) | 1 << i
        for word in b:  # longest common subsequence with one bit a token (Crochemore et al. 2001)
            x = row | where.get(word, 0)
            row = x & ~(x - ((row << 1) | 1))
        lcs = bin(row).count("1")
        best = max(best, 2 * lcs / (len(a) + len(b)) if lcs else 0.0)
    return best


def tokens_13a(text):
    """The tokens of mteval-13a, sacrebleu's default: punctuation splits off, but not inside numbers."""
    text = " " + text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ") + " "
    for old, new in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        text = text.replace(old, new)
    text = re.sub(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])", r" \1 ", text)
    text = re.sub(r"([^0-9])([\.,])", r"\1 \2 ", text)
    text = re.sub(r"([\.,])([^0-9])", r" \1 \2", text)
    return re.sub(r"([0-9])(-)", r"\1 \2 ", text).split()


def grams(words, n):
    return Counter(tuple(words[i:i + n]) for i in range(len(words) - n + 1))


def bleu(candidates, references):
    """Corpus BLEU-4 in 0..1 as sacrebleu computes it: 13a, exponential smoothing, closest reference length.

    candidates: list of texts; references: for each of them a list of texts, of any number."""
    match, total, length, wanted = [0] * 4, [0] * 4, 0, 0
    for candidate, refs in zip(candidates, references):
        have, refs = tokens_13a(candidate), [tokens_13a(r) for r in refs]
        length += len(have)
        wanted += min((abs(len(r) - len(have)), len(r)) for r in refs)[1]
        for n in range(4):
            most = Counter()
            for r in refs:
                most |= grams(r, n + 1)
            count = grams(have, n + 1)
            match[n] += sum((count & most).values())
            total[n] += sum(count.values())
    if 0 in total or match[0] == 0:
        return 0.0
    smooth, log_precision = 1.0, 0.0
    for m, t in zip(match, total):
        smooth *= 1 if m else 2  # each order without a match counts as half of the one before
        log_precision += math.log(m / t if m else 1 / (smooth * t)) / 4
    return math.exp(min(0.0, 1 - wanted / length) + log_precision)


def distinct(texts, n):
    """Different n-grams over all n-grams of all texts (Li et al. 2016): 1 says that nothing is repeated."""
    all_grams = sum((grams(t.split(), n) for t in texts), Counter())
    return len(all_grams) / max(1, sum(all_grams.values()))
