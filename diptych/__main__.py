"""`python -m diptych` is the `diptych` command."""
from diptych.cli.main import entrypoint

if __name__ == "__main__":
    entrypoint()
