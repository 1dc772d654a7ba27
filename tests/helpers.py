"""Tiny random models, prompts, and stores that hold the true in-context KV at other positions."""

from __future__ import annotations

import functools
import json

import torch
import xxhash
from entries import entry as entry
from entries import same as same
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from tokenizers.trainers import BpeTrainer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

import hfblend
from hfblend.blend.caches import RecordingCache
from hfblend.blend.rotation import Realigner
from hfblend.kv.rows import full_length_cache
from hfblend.model.hf_model import CACHE
from hfblend.store import chunk_key
from hfblend.store.format import contents_of, dump
from hfblend.support.registry import model_of

VOCABULARY = 97

# name -> rope_parameters; the short context of the length-dependent ones is crossed by `make_prompt()`
ROPE = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 10000.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [2.0 + 0.3 * i for i in range(8)],
        "original_max_position_embeddings": 64,
        "factor": 4.0,
        "rope_theta": 10000.0,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 10000.0,
    },
}
HEADS = {"mha": (4, 4), "gqa": (4, 2), "mqa": (4, 1)}
FAULTS = {  # of a stored file
    "flip": lambda file: file[:-9] + bytes([file[-9] ^ 1]) + file[-8:],
    "header": lambda file: file[:20] + bytes([file[20] ^ 1]) + file[21:],
    "truncate": lambda file: file[: len(file) // 2],
    "lengthen": lambda file: file + b"\0",
    "empty": lambda file: b"",
    "other key": lambda file: dump(f"{2:064x}", entry()),
}


def make_llama(
    rope: str = "default",
    heads: str = "gqa",
    dtype: torch.dtype = torch.float32,
    vocab_size: int = VOCABULARY,
    layers: int = 4,
    **kwargs,
) -> LlamaForCausalLM:
    max_positions = {"dynamic": 64, "longrope": 256, "yarn": 256, "llama3": 512}.get(rope, 2048)
    query_heads, kv_heads = HEADS[heads]
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=query_heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=max_positions,
        rope_parameters=ROPE[rope],
        initializer_range=0.15,  # logits far enough apart for greedy tokens to mean something
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
        **kwargs,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype).eval()


def make_mistral(window: int | None = 24, dtype: torch.dtype = torch.float32, layers: int = 4) -> MistralForCausalLM:
    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        sliding_window=window,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return MistralForCausalLM(config).to(dtype).eval()


@functools.cache
def shared(make=make_llama, **settings):
    """A model for tests that leave it as it is: it is made, and tests itself, once."""
    return make(**settings)


def make_word_tokenizer():
    """A fast tokenizer of whole words w0 … w88, `##`, `#`, and two special tokens; no file, no network."""
    words = ["<pad>", "<s>", "</s>", "[UNK]", "##", "#"] + [f"w{i}" for i in range(6, 97)]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="[UNK]"
    )


def save_byte_model(folder, texts, chat_template=None):
    """Saves a random model with a byte-level tokenizer, which is trained on `texts`; returns the folder."""
    inner = Tokenizer(BPE())
    inner.pre_tokenizer, inner.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=600, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    inner.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = chat_template
    make_llama(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


MODELS = {
    "llama-mha": lambda dtype=torch.float32: make_llama(heads="mha", dtype=dtype),
    "llama-gqa": lambda dtype=torch.float32: make_llama(heads="gqa", dtype=dtype),
    "llama-mqa": lambda dtype=torch.float32: make_llama(heads="mqa", dtype=dtype),
    "mistral-window": lambda dtype=torch.float32: make_mistral(dtype=dtype),
    "mistral-full": lambda dtype=torch.float32: make_mistral(None, dtype=dtype),
}


def make_prompt(
    sizes=(20, 31, 13), prefix: int = 7, suffix: int = 9, separator=(5, 6), seed: int = 1, order=None
) -> hfblend.Prompt:
    generator = torch.Generator().manual_seed(seed)

    def ids(count):
        return torch.randint(7, VOCABULARY, (count,), generator=generator).tolist()

    prefix_ids, suffix_ids, chunks = ids(prefix), ids(suffix), [ids(size) for size in sizes]
    chunks = chunks if order is None else [chunks[i] for i in order]
    return hfblend.Prompt.from_ids(prefix_ids, chunks, suffix_ids, separator)


def config(ratio: float = 0.15, **kwargs) -> hfblend.BlendConfig:
    """A config with the break-even guard off."""
    settings = {"recompute_ratios": (ratio,), "min_reused_tokens": 0, "separator": (5, 6)}
    return hfblend.BlendConfig(**{**settings, **kwargs})


@torch.no_grad()
def full_prefill_kv(model, input_ids: torch.Tensor) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """K/V of every layer from one stock forward."""
    hf_model = model_of(model)
    cache = RecordingCache(hf_model.num_layers)
    hf_model.decoder_forward(input_ids=input_ids.to(hf_model.device), use_cache=True, **{CACHE: cache})
    return cache.recorded


def store_of_true_kv(
    model,
    prompt: hfblend.Prompt,
    shift: int = 100,
    regime: int | None = None,
    store: hfblend.MemoryStore | None = None,
) -> hfblend.MemoryStore:
    """A store whose entries are the prompt's own in-context KV, moved `shift` positions away.

    Blended back, they must give exactly what a full prefill gives, whatever is selected.
    """
    hf_model, kv = model_of(model), full_prefill_kv(model, prompt.input_ids)
    store = hfblend.MemoryStore() if store is None else store
    now = len(prompt)
    prefix_stop = prompt.chunk_spans[0][0]
    for start, stop in [(0, prefix_stop), *prompt.chunk_spans]:
        if start == stop:
            continue
        positions = torch.arange(start, stop)
        then = regime or now + shift
        pieces = {i: tuple(t[:, :, start:stop] for t in kv[i]) for i in sorted(kv)}
        moved = list(moved_kv(hf_model, pieces, (positions, positions + shift, now), then).values())
        behind = () if start == 0 else tuple(prompt.prefix_ids)
        key = chunk_key(hf_model.fingerprint.current(hf_model.model), hf_model.dtype, prompt.ids[start:stop], behind)
        entry = hfblend.ChunkKV(full_length_cache(moved), positions + shift, behind, "isolated", then)
        store.put(key, entry)
    return store


def moved_kv(hf_model, kv, move, regime):
    """Layer -> K/V (B, Hkv, n, D) moved by a `Realigner`.

    Args:
        move: cached positions (n,), new ones, and the regime of the cached ones.
        regime: of the new ones.
    """
    realigner = Realigner(hf_model.rotary_tables_of_pieces, hf_model.rotations, [move], regime)
    moved = {layer: tuple(torch.empty_like(states) for states in own) for layer, own in kv.items()}
    for layer, own in kv.items():
        realigner.move(layer, [(own, moved[layer])])
    return moved


def generate(model, inputs, **kwargs):
    """Greedy, with the logits of every step."""
    settings = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return model.generate(**inputs, **{**settings, **kwargs})


def largest_difference(one, other) -> float:
    """Largest absolute difference of the logits of two runs, over all steps."""
    return max((a.float() - b.float()).abs().max().item() for a, b in zip(one.logits, other.logits))


def damage(store, key, layer):
    """Flips a bit in the middle of a layer's rows, in a `DiskStore`'s file as it lies there."""
    path = store._path(key)
    content = bytearray(path.read_bytes())
    place = contents_of(key, bytes(content), len(content)).layers[layer]
    content[(place.start + place.stop) // 2] ^= 1
    with open(path, "r+b") as file:  # the same file: readers have it open
        file.write(content)


def header_of(file):
    """The header of a chunk's file, as JSON."""
    return json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])


def signed(header, data):
    """A file with this header, or text in its place, whose digest is right."""
    if isinstance(header, dict):
        header["__metadata__"]["header"] = "0" * 32
        header = json.dumps(header, separators=(",", ":"))
    text = header.encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    length = len(text).to_bytes(8, "little")
    digest = xxhash.xxh3_128_hexdigest(length + text).encode()
    return length + text.replace(b'"header":"' + b"0" * 32, b'"header":"' + digest, 1) + data


def places_in(tree, path=()):
    """The way to every value inside of a JSON tree."""
    if path:
        yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from places_in(value, (*path, key))


def with_another_value(tree, number, value):
    """A JSON tree with another value in one of its places."""
    paths = list(places_in(tree))
    return _replaced(tree, paths[number % len(paths)], value)


def _replaced(tree, path, value):
    if not path:
        return value
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[path[0]] = _replaced(tree[path[0]], path[1:], value)
    return copy


def without(tree, path):
    """A JSON tree that lacks the value at `path`, a way of `places_in`."""
    copy = json.loads(json.dumps(tree))
    inner = functools.reduce(lambda found, key: found[key], path[:-1], copy)
    del inner[path[-1]]
    return copy
