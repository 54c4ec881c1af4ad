"""Keep secrets out of the configuration: all of it is saved with the model, logged and published."""

import re
from collections.abc import Iterator
from typing import Any

from var.utils.api_key import check_address
from var.utils.errors import UserError

# An interpolation of an environment variable whose name ends like that of a secret: HF_TOKEN, WANDB_API_KEY, KEY2.
SECRET = re.compile(r"oc\.env\s*:\s*'?(\w*(?:KEY|TOKEN|SECRET|PASS|PASSWD|PASSWORD|CREDENTIALS?|AUTH)\d*)\b", re.I)


def find_secrets(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield (key, problem) for each secret in an unresolved configuration. The problems do not show the secrets.

    A secret is a variable of the environment with a name like SECRET's, or part of an address (`base_url`). A variable
    with another name is not recognized.
    """
    if isinstance(value, dict | list):
        for name, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from find_secrets(child, f"{key}.{name}" if key else str(name))
    elif isinstance(value, str):
        for name in SECRET.findall(value):
            problem = (
                f"reads {name} from the environment, and its value would be saved in the files of the run. For the key "
                "of an endpoint, set api_key_env of its client to the name of the variable. A class of your own can "
                "take the name too, and read the variable itself."
            )
            yield key, problem
        if "request" in key.split(".") and "oc.env" in value and not SECRET.search(value):
            yield key, "reads a variable of the environment. Fields of requests are saved: write the value itself"
        if key.rpartition(".")[2] == "base_url" and "${" not in value and value not in ("", "???"):
            try:
                check_address(key, value)
            except UserError as error:
                yield key, str(error).removeprefix(f"{key}: ")
