# Setup, the same in every notebook: installs what is missing, leaves the torch that is here, needs no restart.
try:
    from fastkit.lab.notebook import start
except ImportError:  # Colab, Kaggle, another Python: from the clone of fastkit in this folder or above it
    import sys
    from pathlib import Path

    near = [Path.cwd(), *Path.cwd().parents, *Path.cwd().glob("*")]
    clones = [str(folder) for folder in near if (folder / "fastkit" / "lab" / "install.py").is_file()]
    if not clones:
        raise ImportError("clone fastkit into this folder (!git clone ADDRESS), then run this cell again") from None
    sys.path.insert(0, clones[0])
    sys.modules.pop("fastkit", None)  # Python may have taken the clone's folder for the package
    from fastkit.lab.install import install
    from fastkit.lab.notebook import start

    install(clones[0])

lane = start()
