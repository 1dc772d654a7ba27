"""The reasons for which a call of `generate` is not blended. `docs/generate.md` lists the same."""

from __future__ import annotations

import enum
import logging


class Fallback(enum.Enum):
    """A reason for which a call goes through stock `generate`: its message, with a remedy, and its log level."""

    DISABLED = ("the config has enabled=False; set enabled=True, or pass blend_config= for this call.", logging.INFO)
    TRAINING_MODE = ("the model, or a module inside it, is in training mode; call model.eval().", logging.WARNING)
    MODEL_CHANGED = (
        "the model was changed inside the call, or since patch, and the self-test refuses it now; undo the "
        "change, or remove() and patch again.",
        logging.WARNING,
    )
    CONTINUOUS_BATCHING = (
        "continuous batching (generate_batch, its manager, cache_implementation='paged') prefills prompts in full; "
        "call generate, with a batch.",
        logging.WARNING,
    )
    AUTOCAST = (
        "torch.autocast computes in another dtype than the model; load the model in that dtype, or leave autocast.",
        logging.WARNING,
    )
    NO_INPUT_IDS = (
        "there are no input_ids to find chunks in; pass them as a tensor (B, T) of integers, without inputs_embeds.",
        logging.WARNING,
    )
    PADDING = (
        "tokens are masked elsewhere than in front of a prompt; pad on the left (hfblend.Prompt.batch), with a mask of "
        "the shape of input_ids.",
        logging.WARNING,
    )
    NO_CHUNKS = (
        "the prompt has no chunks: no chunk_spans, and fewer than two separators in its ids; build it with "
        "hfblend.Prompt, and pass all of **prompt.inputs().",
        logging.INFO,
    )
    TOO_FEW_TOKENS = (
        "the chunks have fewer tokens than min_reused_tokens, where blending would not pay; lower "
        "BlendConfig(min_reused_tokens=…), 0 blends every prompt.",
        logging.INFO,
    )
    FILLED_CACHE = (
        "past_key_values is not empty, and stock continues it: after it, chunks of one prompt are blended that begin "
        "in the new ids, if it is a plain DynamicCache of the model's KV; leave it out for a new prompt.",
        logging.INFO,
    )
    FOREIGN_CACHE = (
        "the cache, or a layer of it, has code that is not Transformers', and attention may read other K/V than it "
        "keeps; pass a cache of transformers, or none.",
        logging.WARNING,
    )
    NO_CACHE = ("use_cache=False leaves no cache to put KV into; leave use_cache on.", logging.WARNING)
    ALL_ROWS_WANTED = (
        "more than the last row is asked for (logits, hidden states or attentions of all tokens, or a loss), and "
        "reused tokens have none; leave it off, and pass logits_to_keep=1 to the model.",
        logging.WARNING,
    )
    EXTRA_INPUTS = (
        "other inputs than input_ids describe each token, or are images or sound; leave them out.",
        logging.WARNING,
    )
    ADAPTERS = (
        "adapters are chosen for each row (adapter_names), or act in part of the prompt only (aLoRA); use set_adapter, "
        "one call an adapter.",
        logging.WARNING,
    )
    ROPE_REGIMES = (
        "prompts of the batch have different RoPE frequencies alone, and stock gives all of them the longest's; "
        "generate prompts of one regime together.",
        logging.WARNING,
    )
    POSITIONS = (
        "a prompt does not begin at position 0: the model counts its padding, or has more before it; generate prompts "
        "of one length together, or unwrap the model.",
        logging.WARNING,
    )
    NESTED = (
        "this generate runs inside another one of the same model (early-exit drafts); no action is needed.",
        logging.INFO,
    )
    NOT_REACHED = (
        "no forward over the whole prompt reached the decoder (ids became embeddings before, or the whole model is "
        "compiled); patch the model itself, and compile with model.compile().",
        logging.WARNING,
    )

    @property
    def reason(self) -> str:
        return self.value[0]

    @property
    def level(self) -> int:
        return self.value[1]
