"""First slips, written as a new user writes them: each is answered with what was got, what is expected, what to do.

What the answers have in common for all public functions is in test_messages.py, those of `hfblend ask` in test_ask.py.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from unittest import mock

import pytest
from processes import run_copies

TESTS = Path(__file__).parent
BEFORE = f"""
import os, sys
sys.path[:0] = [{str(TESTS)!r}, {str(TESTS.parent)!r}]
import torch, transformers
import hfblend
from helpers import make_llama, make_word_tokenizer

model, tokenizer = make_llama(), make_word_tokenizer()
texts = [f"w{{i}} " * 150 for i in (20, 30, 40)]
prompt = hfblend.Prompt.from_texts(tokenizer, prefix="w10 w11", chunks=texts, suffix="w12 w13")
chat = "{{% for m in messages %}}{{{{ m.content }}}} {{% endfor %}}"
"""
ANSWER = "blender = hfblend.patch(model); model.generate({}, max_new_tokens=2); print(blender.trace)"
SEPARATED = (
    "blender = hfblend.patch(model, {}); ids = tokenizer('{}'.join(texts), return_tensors='pt').input_ids\n"
    "model.generate(ids, max_new_tokens=2); print(blender.trace)"
)
RIGHT_PADDED = """
ids = torch.cat([prompt.input_ids, torch.zeros(1, 4, dtype=torch.long)], 1)
blender = hfblend.patch(model)
model.generate(ids, attention_mask=(ids != 0).long(), chunk_spans=prompt.chunk_spans, max_new_tokens=2)
print(blender.trace)
"""
SLIPS = {  # what a user does -> the script, and what the error, the output or the log says
    # models
    "patches twice": ("hfblend.patch(model); hfblend.patch(model)", r"already patched.*call remove\(\)"),
    "a tokenizer": ("hfblend.patch(tokenizer)", r"must be a causal LM.*got a tokenizer.*AutoModelForCausalLM"),
    "a name": ("hfblend.patch('org/model')", r"got 'org/model'.*from_pretrained"),
    "no generate": ("hfblend.patch(model.model)", r"got a model \(LlamaModel\), which has no generate"),
    "no language model": ("hfblend.patch(torch.nn.Linear(2, 2))", r"\(Linear\), without a config"),
    "training mode": ("hfblend.patch(model.train())", r"training mode.*call model\.eval\(\)"),
    "weights on meta": ("hfblend.patch(model.to('meta'))", "weights are on the device meta.*from_pretrained"),
    "no such folder": (
        "from hfblend.demo.model import load; load('/no/such/folder')",
        "There is no folder /no/such/folder, and it is no hub id such as org/name",
    ),
    # token ids
    "text": ("hfblend.patch(model); model.generate('who?')", r"got 'who\?'.*return_tensors='pt'"),
    "a prompt as it is": ("hfblend.patch(model); model.generate(prompt)", r"\*\*prompt\.inputs\(\)"),
    "ids without values": ("hfblend.patch(model); model.generate(prompt.input_ids.to('meta'))", "device meta"),
    "another model's ids": (
        "hfblend.patch(model).model.generate(**hfblend.Prompt.from_ids([1], [[500] * 300], [3]).inputs())",
        r"ids from 1 to 500; the model's are 0 … 97 − 1\. Is the tokenizer another model's, or was a token added",
    ),
    "more rows than the config says": (
        "model.set_input_embeddings(torch.nn.Embedding(110, model.config.hidden_size))\n"
        "blender = hfblend.patch(model)\n"
        "model.generate(**hfblend.Prompt.from_ids([1], [[105] * 300, [106] * 300], [3]).inputs(), max_new_tokens=2)\n"
        "print(blender.trace)",
        "blended 602 tokens",
    ),
    "texts for ids": ("hfblend.Prompt.from_ids([1], texts, [3])", r"chunks\[0\] must be.*Prompt\.from_texts"),
    # chunks
    "no chunks": (ANSWER.format("torch.arange(7, 40)[None]"), r"no_chunks.*build it with hfblend\.Prompt"),
    "an empty list": (
        ANSWER.format("**hfblend.Prompt.from_texts(tokenizer, prefix='w1', chunks=[], suffix='w2').inputs()"),
        "no_chunks.*Got chunk_spans without a span",
    ),
    "one text": (
        "hfblend.Prompt.from_texts(tokenizer, prefix='w1', chunks='w9', suffix='w2')",
        r"chunks must be a list of texts, got 'w9'; write \[chunk\]",
    ),
    "an empty chunk": (
        "hfblend.Prompt.from_texts(tokenizer, prefix='w1', chunks=['w9', ''], suffix='w2')",
        "Chunk 1 of 2 has no tokens; leave empty chunks out",
    ),
    "few tokens": (
        ANSWER.format("**hfblend.Prompt.from_texts(tokenizer, prefix='w1', chunks=['w9'], suffix='w2').inputs()"),
        r"too_few_tokens.*min_reused_tokens=…\), 0 blends every prompt\. Got 1 reusable",
    ),
    "spans outside": (
        ANSWER.format("prompt.input_ids, chunk_spans=[(5, 9000)]"),
        r"must lie in the prompt of 454 tokens, got \(5, 9000\)",
    ),
    "a base model's chat": (
        "hfblend.Prompt.from_chat(tokenizer, 'w1', texts)", "this tokenizer has none.*Prompt.from_texts"
    ),
    "two placeholders": (
        "hfblend.Prompt.from_chat(tokenizer, '{documents} w1 {documents}', texts, chat_template=chat)",
        "placeholder '{documents}' must stand in the messages once",
    ),
    "documents without text": (
        "hfblend.Prompt.from_chat(tokenizer, 'w1', [{'title': 'w2'}], chat_template=chat)",
        r"documents\[0\] must be a text, or hold one as page_content.*got a dict of 'title'",
    ),
    # separators
    "no tokenizer": (SEPARATED.format("tokenizer=None", " # # "), r"patch\(\) had no tokenizer to look for it"),
    "the unknown token": (
        SEPARATED.format("hfblend.BlendConfig(separator='[UNK]', min_reused_tokens=0), tokenizer", " [UNK] "),
        "blended .*: 1 chunks",
    ),
    "another separator": (SEPARATED.format("tokenizer=tokenizer", " ## "), "no_chunks.*The separator is ' # # '"),
    "an unknown separator": (
        SEPARATED.format("hfblend.BlendConfig(separator='@@'), tokenizer", "@@"),
        "this tokenizer does not know it. Choose another separator",
    ),
    "white space": ("hfblend.BlendConfig(separator=' ')", r"must hold visible text.*Use a string such as ' # # '"),
    # settings
    "percent": ("hfblend.BlendConfig(recompute_ratios=(15,))", r"in \[0, 1\], got 15; 15 % is 0\.15"),
    "one ratio": ("hfblend.BlendConfig(recompute_ratios=0.15)", r"write \(0\.15,\)"),
    "a share's name": ("hfblend.BlendConfig(recompute_ratio=0.15)", "Did you mean 'recompute_ratios'"),
    "an unknown rule": ("hfblend.BlendConfig(selection='sufix_attention')", "Did you mean 'suffix_attention'"),
    "an unknown preset": ("hfblend.BlendConfig(chunk_prefix='fillr')", "Did you mean 'filler'"),
    "an unknown correction": ("hfblend.BlendConfig(correction='ofset')", "Did you mean 'offset'"),
    "a filler without words": (
        "hfblend.patch(model, hfblend.BlendConfig(chunk_prefix='filler'))", r"Give patch\(\) a tokenizer"
    ),
    "layers beyond": (
        "hfblend.patch(model, hfblend.BlendConfig(selection='kv_deviation', check_layers=(9,)))",
        r"reach beyond this model of 4 layers \(0 … 3\)",
    ),
    "a misspelt variable": (
        "os.environ['HFBLEND_RATO'] = '0.2'; hfblend.BlendConfig.from_env()",
        "No setting is read from HFBLEND_RATO. Did you mean HFBLEND_RECOMPUTE_RATIOS",
    ),
    "a variable in percent": (
        "os.environ['HFBLEND_RECOMPUTE_RATIOS'] = '15%'; hfblend.BlendConfig.from_env()",
        r"HFBLEND_RECOMPUTE_RATIOS='15%' cannot be read: expected auto, or numbers in \[0, 1\].*such as 0\.15",
    ),
    "turned off": ("hfblend.BlendConfig(correction='off')", "turned off by None, or by none in the environment"),
    "spaces around a name": (
        "os.environ['HFBLEND_CORRECTION'] = ' offset '; print(hfblend.BlendConfig.from_env().correction)", "offset"
    ),
    # stores
    "a file": ("open('f', 'w').close(); hfblend.patch(model, store='f')", "f is a file; a store is a folder"),
    "inside a file": (
        "open('f', 'w').close(); hfblend.patch(model, store='f/kv')",
        "NotADirectoryError.*a store's folder cannot be made there, name another place: 'f/kv'",
    ),
    # calls
    "padded on the right": (RIGHT_PADDED, r"padding.*pad on the left \(hfblend\.Prompt\.batch\)"),
    "beyond the context": (
        "model.config.max_position_embeddings = 431  # no other test's: it is logged once\n"
        + ANSWER.format("**prompt.inputs()"),
        r"exceeded the model's predefined maximum length \(431\)",
    ),
    "a quantised cache": (
        ANSWER.format("**prompt.inputs(), cache_implementation='quantized'"), "ImportError.*optimum-quanto|blended"
    ),
    "another's cache": (
        "class Mine(transformers.DynamicCache):\n"
        "    def update(self, *args, **kwargs): return super().update(*args, **kwargs)\n"
        + ANSWER.format("**prompt.inputs(), past_key_values=Mine()"),
        "foreign_cache.*pass a cache of transformers, or none",
    ),
    "a cache of pairs": (ANSWER.format("**prompt.inputs(), past_key_values=((1, 2),)"), "Passing a tuple"),
    "no cache": (ANSWER.format("**prompt.inputs(), use_cache=False"), "no_cache.*leave use_cache on"),
    "removed": ("with hfblend.patch(model) as b: pass\nwith b: pass", "was removed"),
    # afterwards
    "shows nothing": ("hfblend.show(None)", r"say blender\.trace, got None"),
    "verifies text": ("hfblend.patch(model).verify('who?')", r"got 'who\?': make one with Prompt\.from_texts"),
    "a typo": ("hfblend.patchh", "has no attribute 'patchh'"),
}  # fmt: skip
AS_NOBODY = "os.mkdir('kv'); os.chmod('kv', 0o555); os.geteuid() or os.setuid(65534)\n"
IN_PROCESSES = {  # of which the rights of this process would be lost
    "a read-only folder": (
        AS_NOBODY + "blender = hfblend.patch(model, store='kv')\n"
        "model.generate(**prompt.inputs(), max_new_tokens=2); print(blender.trace)",
        r"(?s)blended 454 tokens.*could not be written to kv: PermissionError",
    ),
    "a folder that cannot be made": (
        AS_NOBODY + "hfblend.patch(model, store='kv/chunks')",
        "PermissionError.*a store's folder cannot be made there, name another place: 'kv/chunks'",
    ),
}


@pytest.mark.usefixtures("remembered_proofs")
@pytest.mark.parametrize("slip", SLIPS)
def test_a_first_slip_is_answered(slip, tmp_path, capsys, caplog):
    """In this process, as CI has no time for others."""
    script, says = SLIPS[slip]
    here, names = Path.cwd(), {}
    os.chdir(tmp_path)
    try:
        with mock.patch.dict(os.environ):
            exec(BEFORE + script, names)
        error = ""
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    finally:
        os.chdir(here)
    said = error or f"{capsys.readouterr()} {caplog.text}"
    assert re.search(says, said), said


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_first_slips_in_processes(tmp_path):
    """As `python -c` ends: the last line of stderr is the error."""
    slips = {**SLIPS, **IN_PROCESSES}
    folders = [tmp_path / str(number) for number in range(len(slips))]
    tmp_path.chmod(0o755)
    scripts = [
        f"os.mkdir({str(folder)!r}); os.chdir({str(folder)!r})\n{script}"
        for folder, (script, _) in zip(folders, slips.values())
    ]
    for (slip, (_, says)), done in zip(slips.items(), run_copies(BEFORE, scripts)):
        assert re.search(says, done.stdout + done.stderr), (slip, done.stdout, done.stderr)
