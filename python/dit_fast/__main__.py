"""`python -m dit_fast` is `dit-fast`."""

from dit_fast.cli import main

if __name__ == "__main__":
    main()
