"""Models of the Hugging Face Hub, by its own client.

`HF_HOME`, `HF_TOKEN` and `HF_HUB_OFFLINE` mean what they mean to it.
"""

from __future__ import annotations

from pathlib import Path

from qlip_export.errors import QlipError

CONFIG_FILES = ("model_index.json", "*/config.json", "scheduler/*", "tokenizer*/*", "feature_extractor/*")
WEIGHT_FILES = ("*/*.safetensors", "*/*.safetensors.index.json")
DUPLICATES = ("*.fp16.*", "*.non_ema.*", "safety_checker/*", "vae_1_0/*", "vae_encoder/*", "vae_decoder/*")
"""The same weights once more, and parts that no build reads."""


def download(repository: str, revision: str | None, *, weights: bool) -> Path:
    """Return the folder of a model in the Hub's cache, after downloading what it lacks.

    Args:
        repository: ``organisation/model``.
        revision: Branch, tag or commit; none for the main branch.
        weights: Configs alone take a few kilobytes.

    Raises:
        QlipError: Absent, gated, or out of reach, and not in the cache.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"https://huggingface.co/{repository}"
    try:
        folder = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=[*CONFIG_FILES, *(WEIGHT_FILES if weights else ())],
            ignore_patterns=list(DUPLICATES),
        )
    except GatedRepoError as error:
        raise QlipError(
            f"{repository} is gated",
            expected="a token of an account that has accepted its licence",
            found=_first_line(error),
            fix=f"accept the licence at {where}, then set HF_TOKEN or run 'hf auth login'",
        ) from error
    except RepositoryNotFoundError as error:
        raise QlipError(
            f"the Hub has no model {repository}, or your token may not see it",
            expected="a name of the zoo, a folder, or ORGANISATION/MODEL",
            found=_first_line(error),
            fix=f"check {where}; for a private model set HF_TOKEN",
        ) from error
    except RevisionNotFoundError as error:
        raise QlipError(
            f"{repository} has no revision {revision!r}",
            expected="a branch, tag or commit",
            found=_first_line(error),
            fix=f"see {where}/commits",
        ) from error
    except HFValidationError as error:
        raise QlipError(
            f"{repository!r} is no model", expected="ORGANISATION/MODEL or a folder", found=_first_line(error)
        ) from error
    except (EntryNotFoundError, OSError) as error:  # failed requests are OSErrors
        raise QlipError(
            f"cannot download {repository}, and the cache lacks it",
            expected="the Hub within reach, or the model in HF_HOME",
            found=_first_line(error),
            fix="check the network and HF_HUB_OFFLINE" + ("; or try --random-weights" if weights else ""),
        ) from error
    return Path(folder)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
