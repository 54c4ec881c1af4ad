"""Push an exported model to the Hugging Face hub."""

from pathlib import Path

from var.config.run_files import read_mapping
from var.utils.errors import UserError, brief
from var.utils.hub import TOKEN

EARLIER = (  # files of an earlier push, which are removed: transformers could load its adapter or weights
    "*.safetensors", "*.safetensors.index.json", "adapter_config.json", "config.json", "generation_config.json",
    "chat_template.jinja", "tokenizer*", "special_tokens_map.json",
)  # fmt: skip


def check_target(repository: str) -> None:
    """Check the repository's name, the token and its owner, so that a run does not train first.

    Raise UserError if the hub would reject the push. The rights of a fine-grained token are not checked.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    typed = f"export.push_to_hub={repository}"
    try:
        validate_repo_id(repository)
        owner, _ = repository.split("/")
    except (HFValidationError, ValueError) as error:
        raise UserError(f"{typed}: expected owner/name, as in me/my-model.") from error
    if constants.is_offline_mode():
        raise UserError(f"{typed}: HF_HUB_OFFLINE is set. Unset it, or push the finished run later.")
    if not get_token():
        raise UserError(f"{typed}: no token is set. Set one that may write: {TOKEN}.")
    try:
        account = HfApi().whoami()
    except Exception as error:  # the hub's client raises many types
        raise UserError(
            f"{typed}: {constants.ENDPOINT} did not confirm the token ({type(error).__name__}: {brief(error)}). "
            f"Check the network, HF_ENDPOINT and the token: {TOKEN}."
        ) from error
    if ((account.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
        raise UserError(f"{typed}: the token can only read. Set one that may write: {TOKEN}.")
    groups = [group["name"] for group in account.get("orgs", []) if group.get("roleInOrg") != "read"]
    owners = [account["name"], *groups]
    if owner not in owners:
        raise UserError(
            f"{typed}: the token belongs to {owners[0]} and can push to {', '.join(owners)}. Use a token of {owner}, "
            "or another owner."
        )


def explain_local_base(base: str) -> str:
    """Return why an adapter of a model in a folder cannot be pushed alone."""
    return f"an adapter is loaded with its base, {base}, which only this machine has; set adapter.merge=true"


def push_model(folder: Path, repository: str, private: bool) -> str:
    """Push all files of an exported model, and return the address of its page.

    Args:
        folder: the exported model, with its card.
        repository: owner/name on the hub. It is created if it does not exist.
        private: whether a repository that is created is private. An existing one stays as it is.

    Raises:
        UserError: the hub does not take it.
    """
    from huggingface_hub import HfApi

    if (adapter := folder / "adapter_config.json").exists():
        base = read_mapping(adapter).get("base_model_name_or_path")
        if base and Path(base).is_dir():
            raise UserError(f"export.push_to_hub={repository}: {explain_local_base(base)}")
    api = HfApi()
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        message = "Model of a finished run"
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message, delete_patterns=list(EARLIER))
    except Exception as error:  # the hub's client raises many types
        raise UserError(
            f"export.push_to_hub={repository}: the run is complete, and its model was not pushed "
            f"({type(error).__name__}: {brief(error)}). Run the same command to try again."
        ) from error
    return str(url)
