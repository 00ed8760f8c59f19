"""The text of a language model's training: its sources as tokens, and the tokenizer for them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neural_layers.distill.exact_trainer import Feed
from neural_layers.distill.recipes.language_model_options import LanguageModelOptions
from neural_layers.distill.recipes.language_model_progress import reading_bar
from neural_layers.distill.text.errors import TextError
from neural_layers.distill.text.feed import BatchPlan, SampledFeed
from neural_layers.distill.text.holding_out import hold_out, joined
from neural_layers.distill.text.reading import ReadingOptions
from neural_layers.distill.text.sampling import PackedSampler
from neural_layers.distill.text.sources import Part, Source, parse_sources
from neural_layers.distill.text.store import TokenStore, default_cache, open_store
from neural_layers.distill.text.streaming import SourceStream, StreamedFeed
from neural_layers.distill.text.tokenizing import bpe_tokenizer, character_tokenizer, load_text_tokenizer
from neural_layers.errors import InputError

# A tokenizer learns nothing from more text than this, and would hold all of its words in memory.
_TOKENIZER_CHARACTERS = 200_000_000


@dataclass(frozen=True)
class LanguageData:
    """The sources of a run and what their files are read with; `valid` is empty where there is no validation."""

    sources: list[Source]
    valid: tuple[Part, ...]
    reading: ReadingOptions


@dataclass(frozen=True)
class OpenData:
    """What training reads.

    feed: the batches of this process. valid: the tokens to validate on, None for none
    described: of each source what `config.json` keeps, and what must be the same when the run is continued
    """

    feed: Feed
    valid: TokenStore | None
    described: list[dict[str, Any]]


def find_data(options: LanguageModelOptions) -> LanguageData:
    """The sources that the options name. Raises InputError where one cannot be found."""
    sources = parse_sources(options.data)
    reading = ReadingOptions(options.text_field, options.document_separator)
    if options.valid is not None:
        (given,) = parse_sources([options.valid])
        # A folder that divides its files gives its validation part to --valid, as it gives the other to --data.
        return LanguageData(sources, given.valid or given.parts, reading)
    if options.valid_fraction is not None:
        return LanguageData(sources, (), reading)
    return LanguageData(sources, tuple(part for source in sources for part in source.valid), reading)


def make_tokenizer(options: LanguageModelOptions, data: LanguageData) -> Any:
    """The tokenizer that the options ask for. Raises InputError for a wrong name, folder or vocabulary."""
    wanted = options.tokenizer
    if wanted is None:
        wanted = "char" if options.model is None else str(options.model)
    if wanted == "char":
        return character_tokenizer(_texts(data, options.streaming))
    if wanted.startswith("bpe:"):
        if not wanted.removeprefix("bpe:").isdigit():
            raise InputError(f"--tokenizer {wanted}: write bpe:VOCABULARY with a number, as in bpe:8192")
        return bpe_tokenizer(_texts(data, options.streaming), int(wanted.removeprefix("bpe:")))
    return load_text_tokenizer(Path(wanted))


def _texts(data: LanguageData, streaming: bool) -> Iterator[str]:
    # Training text alone: a character of the validation text that training lacks is unknown, as it would be later.
    characters = 0
    for source in data.sources:
        before = characters
        for part in source.parts:
            for piece in part.read(data.reading, streaming):
                yield piece.text
                characters += len(piece.text)
                if characters > _TOKENIZER_CHARACTERS:
                    return
        if characters == before:
            raise TextError(f"{source.name}: no text in it; give data that is not empty")


def cached_tokens(name: str, parts: tuple[Part, ...], tokenizer: Any, data: LanguageData, cache: Path | None) -> Any:
    """The `TokenStore` of some parts, with a bar while they are tokenized."""
    bar: Any = None

    def tell(characters: int) -> None:
        nonlocal bar
        bar = reading_bar(name) if bar is None else bar
        bar.update(characters - bar.n)

    try:
        return open_store(parts, tokenizer, data.reading, cache or default_cache(), tell)
    finally:
        if bar is not None:
            bar.close()


def open_data(
    options: LanguageModelOptions, data: LanguageData, tokenizer: Any, plan: BatchPlan, tell: Callable[[str], None]
) -> OpenData:
    """The training batches of this process and the validation text.

    tell: is called with a line for each source: how much it has, and whether its tokens were in the cache
    Raises: InputError for weights that do not fit, TextError for text that cannot be read or is too short.
    """
    weights, names = [source.weight for source in data.sources], [source.name for source in data.sources]
    valid: TokenStore | None = None
    if options.streaming:
        feed: Feed = _streamed(options, data, tokenizer, plan, weights)
        described = [_outline(source) for source in data.sources]
    else:
        stores = [cached_tokens(s.name, s.parts, tokenizer, data, options.cache) for s in data.sources]
        for name, store in zip(names, stores, strict=True):
            how = "from the cache" if store.reused else "written to the cache"
            tell(f"{name}: {len(store):,} tokens in {len(store.starts):,} documents, {how}")
            tell_unknown(name, store, tokenizer, tell)
        described = [_describe(*values) for values in zip(names, weights, stores, strict=True)]
        if options.valid_fraction is not None:
            for name, store in zip(names, stores, strict=True):
                if (size := int(len(store) * options.valid_fraction)) < 2:
                    share = f"--valid-fraction {options.valid_fraction} of {name}"
                    raise TextError(f"{share} is {size} of {len(store)} tokens; give a larger one, or --valid")
            pairs = [hold_out(store, options.valid_fraction, tokenizer) for store in stores]
            stores, valid = [kept for kept, _ in pairs], joined([held for _, held in pairs])
            tell(f"validation: the last {len(valid):,} tokens are held out")
        sampler = PackedSampler(stores, weights, names, options.context, options.seed)
        feed = SampledFeed(sampler, plan)
    if data.valid:
        valid = cached_tokens("validation", data.valid, tokenizer, data, options.cache)
        tell_unknown("validation", valid, tokenizer, tell)
        described.append(_describe("validation", 0.0, valid))
    if valid is None:
        tell("no validation text: give one with --valid, or --valid-fraction, to see how well the model does")
    return OpenData(feed, valid, described)


def _streamed(
    options: LanguageModelOptions, data: LanguageData, tokenizer: Any, plan: BatchPlan, weights: list[float]
) -> StreamedFeed:
    streams = [
        SourceStream(source, tokenizer, data.reading, options.context, options.seed, number)
        for number, source in enumerate(data.sources)
    ]
    for stream in streams:
        stream.check()
    return StreamedFeed(streams, weights, plan, options.seed)


def tell_unknown(name: str, store: TokenStore, tokenizer: Any, tell: Callable[[str], None]) -> None:
    """Tell how much of a text the tokenizer does not know, where that is anything."""
    if unknown := store.count(tokenizer.unk_token_id):
        tell(
            f"{name}: the tokenizer does not know {unknown:,} of {len(store):,} tokens; all of them look the same to it"
        )


def _outline(source: Source) -> dict[str, Any]:
    """As `describe`, of a source that is streamed: names and sizes of its files, as it is not read beforehand."""
    paths = [Path(part.name) for part in source.parts]
    sizes = [path.stat().st_size if path.is_file() else None for path in paths]
    return {
        "source": source.name,
        "weight": source.weight,
        "parts": [part.name for part in source.parts],
        "sizes": sizes,
    }


def _describe(name: str, weight: float, store: TokenStore) -> dict[str, Any]:
    return {
        "source": name,
        "weight": weight,
        "key": store.key,
        "tokens": len(store),
        "documents": len(store.starts),
        "text_bytes": store.text_bytes,
    }
