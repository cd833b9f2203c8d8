"""Who may read what is published: whom the umask lets, where safetensors would make its files the user's alone."""

from pathlib import Path


def follow(folder: Path) -> None:
    """Give all that lies in `folder`, which mkdir made as the umask says, the folder's own rights."""
    rights = folder.stat().st_mode & 0o777
    for path in folder.rglob("*"):
        path.chmod(rights if path.is_dir() else rights & 0o666)
