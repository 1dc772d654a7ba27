"""Chat templates in the forms of public models, each with the tokens that it writes, and tokenizers to go with them."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AddedToken, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Form:
    """A template; the tokens it writes that are special, and those that are added with `special=False`.

    `roles`: those it takes besides `user` and `assistant`; `parts`: whether it takes contents as lists of parts.
    """

    template: str
    special: tuple[str, ...]
    plain: tuple[str, ...] = ()
    roles: tuple[str, ...] = ("system",)
    parts: bool = False
    sentencepiece: bool = False


def chatml(content: str = "m.content", more: str = "") -> str:
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ " + content + " }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n" + more + "{% endif %}"
    )


def headed(opening: str, closing: str, content: str = "m.content", bos: str = "", cue: str = "assistant") -> str:
    """A template that writes each role in a header: `opening` with {} for the role."""
    header = opening.replace("{}", "{{ m.role }}")
    cue = opening.replace("{}", cue)
    return (
        f"{bos}{{% for m in messages %}}{header}{{{{ {content} }}}}{closing}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{cue}{{% endif %}}"
    )


def by_role(user: str, assistant: str, system: str = "{}\n\n", cue: str = "", bos: str = "", tool: str = "") -> str:
    """A template with a form for each role: {} stands for its content."""
    forms = {"system": system, "user": user, "assistant": assistant, "tool": tool or user}
    branches = "".join(
        "{% "
        + ("if" if role == "system" else "elif")
        + f" m.role == '{role}' %}}"
        + form.replace("{}", "{{ m.content }}").replace("{trim}", "{{ m.content | trim }}")
        for role, form in forms.items()
    )
    ending = f"{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}{cue}{{% endif %}}"
    return f"{bos}{{% for m in messages %}}{branches}{ending}"


_PARTS = "m.content if m.content is string else m.content | map(attribute='text') | join('')"
_TOOLS = (
    "{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
)
_QWEN3 = (
    "{% for m in messages %}" + _TOOLS + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    "{# <tool_call> </tool_call> #}"
)
_LLAMA3_TOOLS = (
    "<|begin_of_text|>{% for m in messages %}{% if m.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>\n\n"
    "{{ m.content | tojson }}<|eot_id|>{% else %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0].content %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}{% for m in rest %}"
    "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m.content if loop.first and system else m.content %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
_HARMONY = (
    "{% for m in messages %}<|start|>{% if m.role == 'tool' %}functions to=assistant<|channel|>commentary<|message|>"
    "{{ m.content | tojson }}{% else %}{{ m.role }}<|message|>{{ m.content }}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
_GRANITE = (
    "{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}<|end_of_text|>\n{% endfor %}"
    '{% for d in documents or [] %}<|start_of_role|>document {"title": {{ d.title | tojson }}}<|end_of_role|>\n'
    "{{ d.text }}<|end_of_text|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)
_COMMAND_R = (
    "{{ bos_token }}{% for m in messages %}<|START_OF_TURN_TOKEN|><|{{ m.role | upper }}_TOKEN|>{{ m.content.strip() }}"
    "<|END_OF_TURN_TOKEN|>{% endfor %}{% if documents %}<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|><results>\n"
    "{% for d in documents %}Document: {{ loop.index0 }}\n{% for k, v in d.items() %}{{ k }}: {{ v }}\n{% endfor %}\n"
    "{% endfor %}</results><|END_OF_TURN_TOKEN|>{% endif %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
)
_R1 = by_role(
    "<｜User｜>{}",
    "<｜Assistant｜>{{ m.content.split('</think>')[-1] }}<｜end▁of▁sentence｜>",
    "{}",
    "<｜Assistant｜><think>\n",
    "{{ bos_token }}",
    "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>{}<｜tool▁output▁end｜><｜tool▁outputs▁end｜>",
)
_TURN, _IM = ("<start_of_turn>", "<end_of_turn>"), ("<|im_start|>", "<|im_end|>")
_HEADER = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_SEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")

FORMS = {
    "chatml": Form(chatml(), _IM),
    "qwen2.5": Form(
        "{% for m in messages %}" + _TOOLS + "{% endfor %}", _IM, ("<tool_call>", "<tool_response>"), ("system", "tool")
    ),
    "qwen3": Form(
        _QWEN3,
        _IM,
        ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
        ("system", "tool"),
    ),
    "qwen3.5, of parts": Form(chatml(f"({_PARTS}) | trim", "<think>\n"), _IM, ("<think>", "</think>"), parts=True),
    "llama-2": Form(_LLAMA2, ("<s>", "</s>"), sentencepiece=True),
    "llama-3": Form(
        headed("<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>", "m.content | trim", "<|begin_of_text|>"),
        _HEADER,
    ),
    "llama-3.1": Form(_LLAMA3_TOOLS, _HEADER, (), ("system", "tool")),
    "llama-3.1, of parts": Form(
        headed("<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>", f"({_PARTS}) | trim"), _HEADER, parts=True
    ),
    "mistral-v1": Form(by_role("[INST] {} [/INST]", "{}</s>", bos="<s>"), ("<s>", "</s>"), sentencepiece=True),
    "mistral-v3": Form(
        by_role(
            "[INST] {}[/INST]",
            " {}</s>",
            "[INST] {}\n\n",
            bos="<s>",
            tool='[TOOL_RESULTS] {"content": {}}[/TOOL_RESULTS]',
        ),
        ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        (),
        ("system", "tool"),
        sentencepiece=True,
    ),
    "mistral-v7": Form(
        by_role("[INST]{}[/INST]", "{}</s>", "[SYSTEM_PROMPT]{}[/SYSTEM_PROMPT]", bos="<s>"),
        ("<s>", "</s>"),
        ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    ),
    "gemma": Form(
        headed("<start_of_turn>{}\n", "<end_of_turn>\n", "m.content | trim", "<bos>", "model"), ("<bos>", *_TURN)
    ),
    "gemma-3, of parts": Form(
        headed("<start_of_turn>{}\n", "<end_of_turn>\n", f"({_PARTS}) | trim", "<bos>", "model"),
        ("<bos>",),
        _TURN,
        parts=True,
    ),
    "gemma-4": Form(
        headed("<|turn>{}\n", "<turn|>\n", "m.content | trim", "<bos>", "model"), ("<bos>",), ("<|turn>", "<turn|>")
    ),
    "phi-3": Form(
        headed("<|{}|>\n", "<|end|>\n"), ("<|end|>",), ("<|user|>", "<|assistant|>", "<|system|>"), sentencepiece=True
    ),
    "phi-4-mini": Form(
        headed("<|{}|>", "<|end|>"),
        ("<|end|>",),
        ("<|user|>", "<|assistant|>", "<|system|>", "<|tool|>"),
        ("system", "tool"),
    ),
    "deepseek-v2": Form(
        by_role("User: {}\n\n", "Assistant: {}<｜end▁of▁sentence｜>", cue="Assistant:", bos="{{ bos_token }}"), _SEEK
    ),
    "deepseek-v3": Form(
        by_role("<｜User｜>{}", "<｜Assistant｜>{}<｜end▁of▁sentence｜>", "{}", "<｜Assistant｜>", "{{ bos_token }}"),
        _SEEK,
        ("<｜User｜>", "<｜Assistant｜>"),
    ),
    "deepseek-r1": Form(
        _R1,
        _SEEK,
        (
            "<｜User｜>",
            "<｜Assistant｜>",
            "<think>",
            "</think>",
            "<｜tool▁outputs▁begin｜>",
            "<｜tool▁output▁begin｜>",
            "<｜tool▁output▁end｜>",
            "<｜tool▁outputs▁end｜>",
        ),
        ("system", "tool"),
    ),
    "command-r": Form(
        _COMMAND_R,
        ("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
        ("<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"),
    ),
    "gpt-oss": Form(
        _HARMONY, ("<|start|>", "<|end|>", "<|message|>", "<|channel|>"), (), ("system", "developer", "tool")
    ),
    "granite": Form(_GRANITE, ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>")),
    "zephyr": Form(headed("<|{}|>\n", "{{ eos_token }}\n"), ("</s>",), sentencepiece=True),
    "vicuna": Form(by_role("USER: {} ", "ASSISTANT: {}</s>", "{} ", "ASSISTANT:"), ("</s>",), ("USER:", "ASSISTANT:")),
    "alpaca": Form(
        by_role("### Instruction:\n{}\n\n", "### Response:\n{}\n\n", cue="### Response:\n"),
        ("</s>",),
        ("### Instruction:", "### Response:"),
    ),
    "falcon": Form(by_role("User: {}\n", "Falcon: {}\n", "System: {}\n", "Falcon:"), ("<|endoftext|>",)),
    "olmo": Form(headed("<|{}|>\n", "\n", bos="{{ bos_token }}"), ("|||IP_ADDRESS|||", "<|endoftext|>")),
    "smollm3": Form(
        chatml("m.content.strip() if m.role == 'system' else m.content", "<think>\n"), _IM, ("<think>", "</think>")
    ),
    "minimax": Form(
        "{% for m in messages %}<beginning_of_sentence>{{ m.role }} name={{ m.role }}\n"
        "{{ m.content | trim }}<end_of_sentence>\n{% endfor %}",
        ("<beginning_of_sentence>",),
        ("<end_of_sentence>",),
    ),
    "internlm": Form(chatml(), ("<s>", "</s>"), _IM, sentencepiece=True),
    "glm-4": Form(
        headed("<|{}|>\n", "", bos="[gMASK]<sop>"),
        ("[gMASK]", "<sop>"),
        ("<|user|>", "<|assistant|>", "<|system|>", "<|observation|>"),
        ("system", "observation"),
    ),
    "hunyuan": Form(
        by_role("<｜hy_User｜>{}", "<｜hy_Assistant｜>{}<｜hy_eos｜>", "{}<｜hy_break｜>", "<｜hy_Assistant｜>"),
        ("<｜hy_eos｜>",),
        ("<｜hy_User｜>", "<｜hy_Assistant｜>"),
    ),
    "starling": Form(
        by_role(
            "GPT4 Correct User: {}<|end_of_turn|>",
            "GPT4 Correct Assistant: {}<|end_of_turn|>",
            cue="GPT4 Correct Assistant:",
        ),
        ("<s>",),
        ("<|end_of_turn|>",),
        sentencepiece=True,
    ),
    "solar": Form(
        by_role("### User:\n{}\n\n", "### Assistant:\n{}\n\n", "### System:\n{}\n\n", "### Assistant:\n"), ("</s>",)
    ),
    "seed-oss": Form(headed("<seed:bos>{}\n", "<seed:eos>"), ("<seed:bos>",), ("<seed:eos>",)),
    "a role's own bracket": Form(
        headed("<{}>", "</turn>"), ("</turn>",), ("<user>", "<assistant>", "<system>", "<tool>"), ("system", "tool")
    ),
}


def tokenizer_of(form: Form) -> PreTrainedTokenizerFast:
    """A tokenizer of single letters with a form's tokens, some whitespace and some markup as added tokens."""
    tokenizer = sentencepiece() if form.sentencepiece else byte_level()
    tokenizer.add_tokens([AddedToken(t, special=True) for t in form.special], special_tokens=True)
    tokenizer.add_tokens([AddedToken(t, special=False) for t in form.plain])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in ("    ", "<table>", "</h1>")])
    tokenizer.bos_token, tokenizer.eos_token = form.special[0], form.special[-1]
    tokenizer.chat_template = form.template
    return tokenizer


def byte_level() -> PreTrainedTokenizerFast:
    """Bytes, as GPT-2's, Llama-3's and Qwen's tokenizers."""
    letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [
        ("a", "b"),
        ("Ċ", "Ċ"),
        ("Ġ", "D"),
        ("o", "c"),
        ("Ġ", "Ġ"),
        (".", "Ċ"),
        ("D", "oc"),
        ("<", "|"),
        ("|", ">"),
    ]
    for left, right in merges:
        letters.setdefault(left + right, len(letters))
    inner = Tokenizer(models.BPE(letters, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def sentencepiece() -> PreTrainedTokenizerFast:
    """Letters with a space put in front and bytes for the rest, as Llama-2's and Mistral's first tokenizers."""
    pieces = ["<unk>", *[f"<0x{i:02X}>" for i in range(256)], "▁", *map(chr, range(33, 127))]
    merges = [("▁", "D"), ("o", "c"), ("▁", "▁"), ("▁", "["), ("<", "s")]
    letters = {piece: i for i, piece in enumerate([*pieces, *map("".join, merges)])}
    inner = Tokenizer(models.BPE(letters, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
