"""Chat templates of the shapes that model families have, written for these tests from their public behavior."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers.small_tokenizers import build
from var.data.chat import Chat

IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
LLAMA3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
MISTRAL = (
    "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
)  # fmt: skip
PHI = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")


@dataclass(frozen=True)
class Form:
    """A template with its tokens, and what it does to messages."""

    text: str | None  # None: the tokenizer's own
    controls: tuple[str, ...]  # tokens that open and close turns, BOS and EOS
    end: str  # the token after a response
    bos: str | None = None
    eos: str = ""  # default: `end`
    plain: tuple[str, ...] = ()  # added tokens that are not special
    inside: tuple[str, ...] = ()  # control tokens within turns
    system: bool = True  # accepts a system turn
    tools: bool = False  # writes tools, tool calls and their results
    name: bool = False  # writes the key `name` of a message
    keeps: bool = True  # writes all content, up to outer white space
    rejects: bool = False  # cannot render some content

    def chat(self, kind: str, smollm2: Path, **options: Any) -> Chat:
        """Return the chat of a tokenizer of a kind with this template."""
        tokenizer = build(kind, self.controls, self.plain, self.bos, self.eos or self.end, smollm2)
        stops = [token for token in self.controls if token == "<|endoftext|>"]
        eos = {"generation_config.json": tokenizer.convert_tokens_to_ids(stops)}
        return Chat(tokenizer, self.text, path=kind, eos=eos, **options)


CHATML = """\
{% for m in messages %}
{{ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# A text in front of the turns, the name in the header, and trimmed content.
NAMED = """\
{% for m in messages %}
{% set who = m.role ~ (' name=' ~ m.name if m.name else '') %}
{{ '<|im_start|>' ~ who ~ '\\n' ~ m.content | trim ~ '<|im_end|>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# The date and the tools are in the system turn, and a tool's result comes from `ipython`.
LLAMA3_TEXT = """\
{% macro turn(role, text) %}
{{ '<|start_header_id|>' ~ role ~ '<|end_header_id|>\\n\\n' ~ text ~ '<|eot_id|>' }}
{%- endmacro %}
{% set system = '' %}
{% set rest = messages %}
{% if messages[0].role == 'system' %}
{% set system = messages[0].content | trim %}
{% set rest = messages[1:] %}
{% endif %}
{% set listed = namespace(text='') %}
{% for tool in tools or [] %}
{% set listed.text = listed.text ~ tool | tojson(indent=2) ~ '\\n\\n' %}
{% endfor %}
{{- bos_token }}
{{- turn('system', 'Today is ' ~ strftime_now('%d %b %Y') ~ '\\n\\n' ~ listed.text ~ system) }}
{%- for m in rest %}
{% if m.role == 'tool' %}
{{- turn('ipython', m.content | tojson) }}
{%- elif m.tool_calls %}
{% set call = m.tool_calls[0].function %}
{{- turn(m.role, '{"name": ' ~ call.name | tojson ~ ', "parameters": ' ~ call.arguments | tojson ~ '}') }}
{%- else %}
{{- turn(m.role, m.content | trim) }}
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

# Every user turn has a BOS, and the system's text is in the first one.
LLAMA2_TEXT = """\
{% set box = namespace(system='') %}
{% for m in messages %}
{% if m.role == 'system' %}
{% set box.system = '<<SYS>>\\n' ~ m.content ~ '\\n<</SYS>>\\n\\n' %}
{% elif m.role == 'user' %}
{{ bos_token ~ '[INST] ' ~ box.system ~ m.content | trim ~ ' [/INST]' }}
{%- set box.system = '' %}
{% else %}
{{ ' ' ~ m.content | trim ~ ' ' ~ eos_token }}
{%- endif %}
{% endfor %}"""

QWEN_TOOLS = """\
{% set given = messages[0].content if messages[0].role == 'system' else DEFAULT %}
{% if tools %}
{{ '<|im_start|>system\\n' ~ given ~ '\\n\\nThe tools:\\n<tools>' }}
{%- for tool in tools %}{{ '\\n' ~ tool | tojson }}{% endfor %}
{{ '\\n</tools>\\nCall them with <tool_call></tool_call>.<|im_end|>\\n' }}
{%- elif given %}{{ '<|im_start|>system\\n' ~ given ~ '<|im_end|>\\n' }}{% endif %}
"""
QWEN_CALLS = """\
{% macro write_calls(m) %}
{% for call in m.tool_calls or [] %}
{% set f = call.function %}
{{ '\\n<tool_call>\\n{"name": "' ~ f.name ~ '", "arguments": ' ~ f.arguments | tojson ~ '}\\n</tool_call>' }}
{%- endfor %}
{% endmacro %}
{% macro write_result(m, i) %}
{% set before, after = i and messages[i - 1].role == 'tool', messages[i + 1] and messages[i + 1].role == 'tool' %}
{{ '' if before else '<|im_start|>user' }}{{ '\\n<tool_response>\\n' ~ m.content ~ '\\n</tool_response>' }}
{{- '' if after else '<|im_end|>\\n' }}
{%- endmacro %}
"""

# A default system text if the conversation has none. Results of tools share one user turn.
QWEN25 = (
    QWEN_CALLS
    + QWEN_TOOLS.replace("DEFAULT", "'Help the user.'")
    + """\
{% for m in messages %}
{% if m.role == 'system' and loop.first %}
{% elif m.role == 'tool' %}{{ write_result(m, loop.index0) }}
{%- else %}
{{ '<|im_start|>' ~ m.role ~ '\\n' ~ (m.content or '') ~ write_calls(m) ~ '<|im_end|>\\n' }}
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
)

# The last answer has a block of reasoning, an empty one if it has none. Earlier answers have theirs removed.
QWEN3 = (
    QWEN_CALLS
    + QWEN_TOOLS.replace("DEFAULT", "''")
    + """\
{% set last = namespace(query=0) %}
{% for m in messages %}{% if m.role == 'user' %}{% set last.query = loop.index0 %}{% endif %}{% endfor %}
{% for m in messages %}
{% if m.role == 'system' and loop.first %}
{% elif m.role == 'tool' %}{{ write_result(m, loop.index0) }}
{%- elif m.role == 'assistant' %}
{% set text, thought = m.content or '', m.reasoning_content or '' %}
{% if not thought and '</think>' in text %}
{% set thought = text.split('</think>')[0].split('<think>')[-1] | trim %}
{% set text = text.split('</think>')[-1].lstrip('\\n') %}
{% endif %}
{% set block = '<think>\\n' ~ thought ~ '\\n</think>\\n\\n' %}
{% set shown = loop.index0 > last.query and (loop.last or thought) %}
{{ '<|im_start|>assistant\\n' ~ (block if shown else '') ~ text ~ write_calls(m) ~ '<|im_end|>\\n' }}
{%- else %}{{ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}{{ '' if enable_thinking | default(true) else '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}"""
)

# Turns alternate, the system's text is in the last user turn, and ids of tool calls have nine characters.
MISTRAL_TEXT = """\
{{- bos_token }}
{%- set system = messages[0].content ~ '\\n\\n' if messages[0].role == 'system' else '' %}
{% set rest = messages[1:] if system else messages %}
{% set last = namespace(user=0, expect='user') %}
{% for m in rest %}
{% if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}
{% if m.role in ('user', 'assistant') and not m.tool_calls %}
{% if m.role != last.expect %}{{ raise_exception('turns must alternate') }}{% endif %}
{% set last.expect = 'assistant' if m.role == 'user' else 'user' %}
{% endif %}
{% endfor %}
{% for m in rest %}
{% if m.role == 'user' %}
{% if loop.index0 == last.user and tools %}{{ '[AVAILABLE_TOOLS]' ~ tools | tojson ~ '[/AVAILABLE_TOOLS]' }}{% endif %}
{{- '[INST]' ~ (system if loop.index0 == last.user else '') ~ m.content ~ '[/INST]' }}
{%- elif m.tool_calls %}
{{- '[TOOL_CALLS][' }}
{%- for call in m.tool_calls %}
{% if (call.id or '') | length != 9 %}{{ raise_exception('ids of tool calls have 9 characters') }}{% endif %}
{% set f = call.function %}
{{- '{"name": ' ~ f.name | tojson ~ ', "arguments": ' ~ f.arguments | tojson ~ ', "id": "' ~ call.id ~ '"}' }}
{%- if not loop.last %}{{ ', ' }}{% endif %}
{% endfor %}
{{- ']' ~ eos_token }}
{%- elif m.role == 'tool' %}
{{- '[TOOL_RESULTS]{"content": ' ~ m.content | tojson ~ ', "call_id": "' ~ m.tool_call_id ~ '"}[/TOOL_RESULTS]' }}
{%- else %}
{{- ' ' ~ m.content ~ eos_token }}
{%- endif %}
{% endfor %}"""

# The assistant is called model, and content is trimmed. SYSTEM: what it does with a system turn.
GEMMA = """\
{{- bos_token }}
{%- set first = '' %}
{% set rest = messages %}
{% if messages[0].role == 'system' %}
SYSTEM
{% endif %}
{% for m in rest %}
{% set role = 'model' if m.role == 'assistant' else m.role %}
{{- '<start_of_turn>' ~ role ~ '\\n' ~ (first if loop.first else '') ~ m.content | trim ~ '<end_of_turn>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{% endif %}"""
GEMMA_MERGES = GEMMA.replace("SYSTEM", "{% set first = messages[0].content ~ '\\n\\n' %}{% set rest = messages[1:] %}")
GEMMA_REJECTS = GEMMA.replace("SYSTEM", "{{ raise_exception('a system turn is not supported') }}")
GEMMA_TOKENS = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")

# Users' turns have no end, and answers lose what is before </think>.
R1 = """\
{{- bos_token }}
{%- for m in messages %}
{% if m.role == 'system' %}{{ m.content }}
{%- elif m.role == 'user' %}{{ '<|User|>' ~ m.content }}
{%- else %}{{ '<|Assistant|>' ~ m.content.split('</think>')[-1] ~ eos_token }}
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}"""

PHI_TEXT = """\
{% for m in messages %}{{ '<|' ~ m.role ~ '|>\\n' ~ m.content ~ '<|end|>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""

FORMS = {
    "chatml": Form(CHATML, IM, "<|im_end|>"),
    "own": Form(None, IM, "<|im_end|>"),  # SmolLM2's
    "named": Form(NAMED, IM, "<|im_end|>", eos="<|endoftext|>", name=True),
    "llama3": Form(LLAMA3_TEXT, LLAMA3, "<|eot_id|>", bos="<|begin_of_text|>", tools=True),
    "llama2": Form(LLAMA2_TEXT, ("<s>", "</s>"), "</s>", bos="<s>"),
    "qwen2.5": Form(QWEN25, IM, "<|im_end|>", plain=("<tool_call>", "</tool_call>"), tools=True),
    "qwen3": Form(
        QWEN3, IM, "<|im_end|>", plain=("<think>", "</think>", "<tool_call>", "</tool_call>"), tools=True, keeps=False
    ),
    "mistral": Form(MISTRAL_TEXT, MISTRAL, "</s>", bos="<s>", tools=True, inside=MISTRAL[4:7]),
    "gemma": Form(GEMMA_MERGES, GEMMA_TOKENS, "<end_of_turn>", bos="<bos>", eos="<eos>"),
    "gemma-rejects": Form(GEMMA_REJECTS, GEMMA_TOKENS, "<end_of_turn>", bos="<bos>", eos="<eos>", system=False),
    "r1": Form(
        R1, ("<s>", "</s>", "<|User|>", "<|Assistant|>"), "</s>", bos="<s>", plain=("<think>", "</think>"), keeps=False
    ),
    "phi": Form(PHI_TEXT, PHI, "<|end|>", eos="<|endoftext|>"),
    "plain": Form("plain", ("<s>", "</s>"), "</s>", bos="<s>"),
    "cuts": Form(CHATML.replace("m.content", "m.content[:12]"), IM, "<|im_end|>", keeps=False),
    "drops": Form(CHATML.replace("m.content", "('' if m.role == 'system' else m.content)"), IM, "<|im_end|>",
                  keeps=False),
    "lowers": Form(CHATML.replace("m.content", "m.content | lower"), IM, "<|im_end|>", keeps=False),
    "removes": Form(CHATML.replace("m.content", "m.content | replace('<|im_end|>', '')"), IM, "<|im_end|>"),
    "raises": Form(
        CHATML.replace("'<|im_start|>' ~", "(raise_exception('no é') if 'é' in m.content else '<|im_start|>') ~"),
        IM, "<|im_end|>", rejects=True,
    ),
}  # fmt: skip
