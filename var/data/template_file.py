"""Where the text of a chat template is from: a setting, a file, or the template `plain`."""

from pathlib import Path

from var.utils.errors import UserError, brief

# The template `plain`, for base models: any tokenizer has these characters and an end-of-sequence token.
PLAIN = """\
{%- if bos_token %}{{ bos_token }}{% endif %}
{%- for message in messages %}
  {{- '### ' + message['role'] | capitalize + ':\n' + message['content'] }}
  {{- eos_token if message['role'] == 'assistant' else '' }}
  {{- '\n\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"""


def read_template(value: str, key: str = "model.chat_template") -> str:
    """Return a chat template: `value` itself, the text of a .jinja file, or the template `plain`."""
    if value == "plain":
        return PLAIN
    if not value.endswith(".jinja") and "{" not in value:
        raise UserError(f"{key}={value}: expected plain, a .jinja file or a Jinja template, which has {{{{ … }}}}.")
    if not value.endswith(".jinja"):
        return value
    file = Path(value).expanduser()
    if not file.is_file():
        raise UserError(f"{key}={value} is not a file. Set it to a Jinja template, a .jinja file or plain.")
    try:
        text = file.read_text(encoding="utf-8-sig")  # a byte order mark would start every prompt
    except UnicodeDecodeError as error:
        raise UserError(f"{key}={value}: is not text in UTF-8 ({brief(error)}).") from error
    if not text.strip():
        raise UserError(f"{key}={value} is empty.")
    return text
