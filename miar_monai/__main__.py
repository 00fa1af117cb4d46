"""``python -m miar_monai``: the command ``miar``, as torchrun starts it."""

from miar_monai.cli.main import main

if __name__ == "__main__":
    main()
