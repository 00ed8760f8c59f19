"""Translation scores against sacrebleu, rouge-score and the formula of BERTScore in loops."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("sacrebleu", reason="sacrebleu is not installed")
pytest.importorskip("rouge_score", reason="rouge-score is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer
from sacrebleu.metrics import BLEU, CHRF, TER

from neural_layers.distill.validation import BertScore, TranslationScorer, translation_quality
from neural_layers.distill.validation.words import target_tokenizer, unspaced_share, words
from neural_layers.errors import InputError

# Few words, so that n-grams match; some texts are empty, some are punctuation alone.
TEXT = st.lists(st.sampled_from(["the", "dog", "sees", "Dog", "a", "house", "über", ".", "don't", "x-y"]), max_size=9)
PAIRS = st.lists(st.tuples(TEXT, TEXT.filter(bool)), min_size=1, max_size=6)
EXAMPLES = settings(max_examples=80, derandomize=True, deadline=None, database=None)


@given(PAIRS)
@EXAMPLES
def test_scores_of_summed_statistics_are_sacrebleus_corpus_scores(pairs) -> None:
    hypotheses, references = ([" ".join(words) for words in side] for side in zip(*pairs, strict=True))
    found = TranslationScorer(references).measures(hypotheses)
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF()), ("ter", TER())):
        expected = metric.corpus_score(hypotheses, [references]).score
        assert found[name].value == pytest.approx(expected, abs=1e-6)
        # Of any sample too: here each sentence alone.
        alone = [metric.corpus_score([h], [[r]]).score for h, r in zip(hypotheses, references, strict=True)]
        assert found[name].per_example() == pytest.approx(alone, abs=1e-6)


@given(st.integers(0, 2**32))
@settings(max_examples=100, derandomize=True, deadline=None, database=None)
def test_formulas_are_sacrebleus_on_any_counts(seed: int) -> None:
    from neural_layers.distill.validation import corpus_scores

    generator = np.random.default_rng(seed)
    lengths, total = generator.integers(0, 9, size=2), -np.sort(-generator.integers(0, 7, size=4))
    lengths[0] = total[0]
    matches = np.minimum(generator.integers(0, 4, size=4), total)
    bleu = np.concatenate([lengths, matches, total]).astype(float)
    orders = generator.integers(0, 5, size=(6, 3))
    orders[:, 2] = np.minimum(orders[:, 2], orders[:, :2].min(axis=1))
    ter = generator.integers(0, 3, size=2).astype(float)
    for formula, metric, sums in (
        (corpus_scores.bleu, BLEU(), bleu),
        (corpus_scores.chrf, CHRF(), orders.reshape(-1).astype(float)),
        (corpus_scores.ter, TER(), ter),
    ):
        expected = metric._compute_score_from_stats(list(sums)).score
        assert formula(sums) == pytest.approx(expected, abs=1e-9)
        assert formula(np.stack([sums, sums])) == pytest.approx([expected] * 2, abs=1e-9)


@given(PAIRS)
@EXAMPLES
def test_rouge_of_ascii_is_that_of_rouge_score(pairs) -> None:
    ascii_only = [[" ".join(side).replace("ü", "u") for side in pair] for pair in pairs]
    hypotheses, references = zip(*ascii_only, strict=True)
    judge = RougeScorer(["rouge1", "rouge2", "rougeL"])
    found = TranslationScorer(references).measures(hypotheses)
    for name in ("rouge1", "rouge2", "rougeL"):
        scores = [judge.score(r, h)[name].fmeasure for h, r in ascii_only]
        assert found[name].value == pytest.approx(100 * np.mean(scores), abs=1e-9)


def test_rouge_keeps_letters_that_rouge_score_drops() -> None:
    # Its own tokenizer sees "gr" and "e" in both, and so a match in three words of four.
    assert DefaultTokenizer().tokenize("Größe") == DefaultTokenizer().tokenize("Grüße") == ["gr", "e"]
    assert translation_quality(["Größe"], ["Grüße"]).rouge1 == 0.0
    assert words("Größe, ÉTÉ_3 — наш हिन्दी!") == ["größe", "été", "3", "наш", "हिन्दी"]
    assert translation_quality(["наш дом"], ["наш дом"]).rougeL == 100.0


@given(st.text(alphabet=st.characters(max_codepoint=127)))
@EXAMPLES
def test_words_of_ascii_are_those_of_rouge_score(text: str) -> None:
    assert words(text) == DefaultTokenizer().tokenize(text)


def test_exact_matches_and_lengths() -> None:
    found = translation_quality(["ein Hund.", "", "das Haus", "x"], ["ein Hund.", "nein", "Das Haus", "a b c d e"])
    assert found.exact_match == 0.25
    assert found.length_ratio == pytest.approx((3 + 0 + 2 + 1) / (3 + 1 + 2 + 5), abs=1e-6)


CHINESE = ["我们的房子在森林里。", "他看见了一只狗。"]


@pytest.mark.parametrize(
    "references", [CHINESE, ["わたしたちの家は森の中にあります。"], ["บ้านของเราอยู่ในป่า"], ["ផ្ទះរបស់យើងនៅក្នុងព្រៃ"]]
)
@pytest.mark.parametrize("language", [None, "de"])
def test_text_without_spaces_needs_its_language(references, language) -> None:
    with pytest.raises(InputError, match=r"bleu, ter and length_ratio cannot be computed: .*--target-language"):
        TranslationScorer(references, language)


@pytest.mark.parametrize(("language", "judge"), [("zh", "zh"), ("zh-CN", "zh"), ("ja", "char"), ("th", "char")])
def test_text_without_spaces_is_scored_by_characters(language: str, judge: str) -> None:
    hypotheses = ["我们的房子在山里。", "他看见了一只猫。"]
    found = TranslationScorer(CHINESE, language).measures(hypotheses)
    assert found["bleu"].value == pytest.approx(BLEU(tokenize=judge).corpus_score(hypotheses, [CHINESE]).score)
    assert 5 < found["bleu"].value < 90
    # One character of ten, "森林" → "山", makes two edits; one of eight makes one.
    assert found["ter"].value == pytest.approx(100 * 3 / 18)
    assert found["rouge1"].value == pytest.approx(100 * (2 * 7 / (8 + 9) + 2 * 6 / (7 + 7)) / 2)
    assert found["length_ratio"].value == pytest.approx(17 / 18)


def test_spaced_scripts_need_no_language() -> None:
    assert (
        target_tokenizer(["우리 집은 숲에 있다", "हमारा घर", "بيتنا في الغابة", "наш дом", "unser Haus 家"], None)
        == "13a"
    )
    assert unspaced_share(["ab 家"]) == pytest.approx(1 / 3)
    assert unspaced_share(["12 …"]) == 0


def test_scores_need_as_many_hypotheses_as_references() -> None:
    with pytest.raises(ValueError, match="no references"):
        TranslationScorer([])
    with pytest.raises(ValueError, match="2 hypotheses for 1 references"):
        TranslationScorer(["a"]).measures(["a", "b"])


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """The folder of a BERT of three layers with random weights."""
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("encoder")
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "dog", "sees", "a", "man", "house", "in", "wood"]
    BertTokenizer(vocab={word: i for i, word in enumerate(known)}).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
    BertModel(BertConfig(vocab_size=len(known), max_position_embeddings=12, **sizes)).save_pretrained(folder)
    return folder


def test_bertscore_is_the_greedy_matching_of_the_paper(encoder) -> None:
    from transformers import AutoModel, AutoTokenizer

    hypotheses = ["the dog sees", "a man", "in the wood a house sees the dog"]
    references = ["the man sees a dog", "a man", "the house"]
    model, tokenizer = AutoModel.from_pretrained(encoder), AutoTokenizer.from_pretrained(encoder)

    @torch.no_grad()
    def states(text: str) -> list[torch.Tensor]:
        output = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True)
        return list(output.hidden_states[2][0])

    def best(token: torch.Tensor, others: list[torch.Tensor]) -> float:
        return max(float(torch.cosine_similarity(token, other, dim=0)) for other in others)

    expected = []
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        ours, theirs = states(hypothesis), states(reference)
        # The first and the last are [CLS] and [SEP].
        precision = np.mean([best(token, theirs) for token in ours[1:-1]])
        recall = np.mean([best(token, ours) for token in theirs[1:-1]])
        expected.append(100 * 2 * precision * recall / (precision + recall))
    score = BertScore(encoder, num_layers=2, batch_size=2)
    assert score.f1(hypotheses, references) == pytest.approx(expected, abs=1e-3)
    assert expected[1] == pytest.approx(100)
    assert score.f1(["", "a man", "  "], ["a man", "", ""]).tolist() == [0, 0, 0]
    # Longer than the encoder reads: cut.
    assert 0 < score.f1(["the dog " * 20], ["a man"])[0] < 100
    assert BertScore(encoder).num_layers == 3


def test_bertscore_stands_beside_the_others_only_with_an_encoder(encoder) -> None:
    assert "bertscore" not in translation_quality(["the dog"], ["a man"]).as_dict()
    found = translation_quality(["the dog"], ["a man"], encoder=BertScore(encoder, 2))
    assert 0 < found.as_dict()["bertscore"] < 100


def test_an_encoder_that_cannot_be_used_is_refused(encoder, tmp_path) -> None:
    with pytest.raises(InputError, match="no config.json"):
        BertScore(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(InputError, match="no \\*.safetensors"):
        BertScore(tmp_path)
    for layers in (0, 4):
        with pytest.raises(InputError, match=f"{layers} layers for BERTScore, but .* has 3; give 1 to 3"):
            BertScore(encoder, layers)
