"""Training a CAT classifier: the data, the paper's recipe, the loop, and what a run leaves."""

from importlib.util import find_spec

for package in ("PIL", "matplotlib", "safetensors", "sklearn", "tqdm"):
    if find_spec(package) is None:
        raise ImportError(f"training needs {package}: pip install 'catkernels[train]'")
