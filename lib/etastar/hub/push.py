"""An exported run or a table of runs to the hub by huggingface_hub: private unless told otherwise, and nothing that is not on a list."""

import contextlib
import dataclasses
import fnmatch
import io
import json
import re
from pathlib import Path

import pandas as pd

from etastar.engine.store import Store
from etastar.hub.card import without_folders
from etastar.hub.settings import endpoint, is_offline

# All that is ever uploaded of a model's folder; its subfolders, and links, never are.
ALLOWED = ("config.json", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json",
           "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "README.md", "LICENSE", "etastar.json")
TABLES = (".csv", ".parquet")


@dataclasses.dataclass(frozen=True)
class Pushed:
    """What was uploaded, or would be: `files` and their bytes, and what of the folder is `left_out`; no commit after a dry run."""

    repo_id: str
    repo_type: str
    private: bool
    files: dict[str, int]
    left_out: tuple[str, ...] = ()
    url: str | None = None
    commit: str | None = None

    def __str__(self):
        rows = [f"{size:>14,}  {name}" for name, size in self.files.items()]
        rows += [f"{'not uploaded':>14}  {name}" for name in self.left_out]
        where = f"{'private' if self.private else 'public'} {self.repo_type} {self.repo_id}"
        done = f"to the {where}: {self.url} at {self.commit}" if self.commit else f"would go to the {where}; nothing was sent"
        return "\n".join([*rows, f"{sum(self.files.values()):>14,}  bytes {done}"])


def push(folder_or_table, repo_id: str, *, private: bool = True, token: str | None = None, message: str | None = None,
         dry_run: bool = False) -> Pushed:
    """Upload the folder of a model, or a table of runs as a dataset, to OWNER/NAME of the hub in one commit.

    A table is a DataFrame, a .csv or .parquet file, or the folder of a store. `token` None is that of HF_TOKEN or of `hf auth login`;
    HF_ENDPOINT names another hub. `dry_run` lists files and bytes, asks for no token and sends nothing. A corpus of files on this machine
    is told without their folder.
    Raises ValueError for what is neither, for what names a folder of this machine (the home, the working folder, its own), without a
    token or the right to write, for a public repository where a private one is meant, and where an upload did not get through: the same
    call goes on, and what is there already is not sent again.
    """
    _check_name(repo_id)
    repo_type, contents, left_out = _contents(folder_or_table)
    files = {name: len(body) if isinstance(body, bytes) else body.stat().st_size for name, body in contents.items()}
    planned = Pushed(repo_id, repo_type, private, files, left_out)
    if dry_run:
        return planned
    api = _api(token)
    with _explained(repo_id):
        _open_repository(api, repo_id, repo_type, private)
        commit = _commit(api, repo_id, repo_type, contents, message or f"{repo_type} by etastar")
    return dataclasses.replace(planned, url=f"{api.endpoint}/{'datasets/' * (repo_type == 'dataset')}{repo_id}", commit=commit)


def push_command(options) -> str:
    """What `etastar push` prints; takes what, repo_id, public, message, dry_run and json."""
    done = push(options.what, options.repo_id, private=not options.public, message=options.message, dry_run=options.dry_run)
    return json.dumps(dataclasses.asdict(done), indent=1) if options.json else str(done)


def _check_name(repo_id: str) -> None:
    from huggingface_hub.utils import validate_repo_id

    if repo_id.count("/") != 1:
        raise ValueError(f"{repo_id!r} does not name a repository of the hub; write OWNER/NAME")
    validate_repo_id(repo_id)


# -- what is uploaded -------------------------------------------------------------------------------------------------


def _contents(given) -> tuple[str, dict[str, Path | bytes], tuple[str, ...]]:
    """(type of repository, bytes or path of each file, what is left out) of a folder or table."""
    if isinstance(given, pd.DataFrame):
        table = given.assign(corpus=given["corpus"].map(without_folders, na_action="ignore")) if "corpus" in given else given
        return "dataset", _table_files(table, "runs.parquet", _parquet(table)), ()
    path = Path(given).expanduser()
    if path.suffix in TABLES and path.is_file():
        read = pd.read_csv if path.suffix == ".csv" else pd.read_parquet
        return "dataset", _table_files(read(path), f"runs{path.suffix}", path), ()
    if path.is_dir() and not (path / "config.json").exists() and Store(path).run_ids():
        return _contents(Store(path).table())
    if not path.is_dir():
        raise ValueError(f"{path} is neither the folder of a model nor a table of runs ({', '.join(TABLES)})")
    return _model_files(path)


def _model_files(folder: Path) -> tuple[str, dict[str, Path], tuple[str, ...]]:
    found = {path.name + "/" * path.is_dir(): path for path in sorted(folder.iterdir())}
    kept = {name: path for name, path in found.items() if any(fnmatch.fnmatchcase(name, allowed) for allowed in ALLOWED)
            and path.is_file() and not path.is_symlink()}
    if "config.json" not in kept or not any(name.endswith(".safetensors") for name in kept):
        raise ValueError(f"{folder} is not the folder of a model: it needs config.json and model.safetensors, as es.export(run, folder) "
                         "writes them, or the runs of a store")
    for name, path in kept.items():
        if name.endswith((".md", ".json")) and name != "tokenizer.json":  # whose vocabulary is free to hold any string
            _refuse_own_folder(name, path.read_text(errors="replace"), folder)
    return "model", kept, tuple(name for name in found if name not in kept)


def _table_files(table: pd.DataFrame, name: str, body: Path | bytes) -> dict[str, Path | bytes]:
    """A table and a card that tells the hub's viewer where it is."""
    if not len(table):
        raise ValueError("the table has no runs, so there is nothing to upload")
    for column in table.select_dtypes(exclude=["number", "bool", "datetime"]):
        _refuse_own_folder(f"column {column}", "\n".join(map(str, table[column])))
    columns = "\n".join(f"| `{column}` | {table[column].dtype} |" for column in table)
    card = (f"---\nconfigs:\n- config_name: default\n  data_files: {name}\ntags:\n- etastar\n- learning-rate\n---\n\n# Training runs\n\n"
            f"{len(table)} training runs, one a row, from a store of etastar, a kit that re-tests what the learning-rate papers claim. "
            f"Losses are in nats per token.\n\n| column | type |\n|---|---|\n{columns}\n")
    return {"README.md": card.encode(), name: body}


def _refuse_own_folder(where: str, text: str, folder: Path | None = None) -> None:
    """ValueError where a text tells how folders are called on this machine."""
    for path in (Path.home(), Path.cwd(), *([folder.resolve()] if folder else ())):
        if len(path.parts) > 1 and re.search(re.escape(str(path)) + r"(?![\w-])", text):
            raise ValueError(f"{where} names {path}, a folder of this machine; take it out, and push again")


def _parquet(table: pd.DataFrame) -> bytes:
    table.to_parquet(out := io.BytesIO(), index=False)
    return out.getvalue()


# -- how it is uploaded -----------------------------------------------------------------------------------------------


def _api(token: str | None):
    """The hub's client; ValueError without a network or a token."""
    from huggingface_hub import HfApi, get_token

    if is_offline():
        raise ValueError("HF_HUB_OFFLINE is set, and an upload needs the hub; unset it, or look at what would go with dry_run")
    token = token or get_token()
    if not token:
        raise ValueError("there is no token to upload with: make one with write access at the hub's settings/tokens, then set HF_TOKEN or "
                         "run `hf auth login`")
    return HfApi(endpoint=endpoint(), token=token)


def _open_repository(api, repo_id: str, repo_type: str, private: bool) -> None:
    """Make the repository unless it is there; ValueError where it is public and a private one was asked for."""
    api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
    if private and not api.repo_info(repo_id, repo_type=repo_type).private:
        raise ValueError(f"the {repo_type} {repo_id} is there and public; say private=False (--public) to upload to it, or name another")


def _commit(api, repo_id: str, repo_type: str, contents: dict[str, Path | bytes], message: str) -> str:
    """One commit of exactly these files; returns its hash."""
    from huggingface_hub import CommitOperationAdd

    adds = [CommitOperationAdd(name, body if isinstance(body, bytes) else str(body)) for name, body in contents.items()]
    return api.create_commit(repo_id, adds, commit_message=message, repo_type=repo_type).oid


@contextlib.contextmanager
def _explained(repo_id: str):
    """What the hub or the network answers, in one sentence with the mend."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    mends = {401: "the token is not valid; make another and set HF_TOKEN or run `hf auth login`",
             403: f"the token may not write to {repo_id.split('/')[0]}; take one with write access to it",
             404: "there is no such repository, or the token cannot see it"}
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        why = mends.get(status, "the same command tries again, and sends only what is not there yet")
        raise ValueError(f"the upload to {repo_id} was refused ({status}): {why} [{str(error).splitlines()[0]}]") from None
    except (HTTPError, OSError, RuntimeError) as error:
        cause = error.__cause__ or error
        raise ValueError(f"the upload to {repo_id} did not get through ({type(cause).__name__}: {str(cause).splitlines()[0]}); the same "
                         "command tries again, and sends only what is not there yet") from None
