"""The former name of `miar_monai.cli.main`."""

from miar_monai.cli.main import *  # noqa: F403
from miar_monai.cli.main import main

if __name__ == "__main__":
    main()
