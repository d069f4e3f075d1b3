"""``python scripts/make_shards.py SOURCE OUT``: the command swinv2-make-shards, by the name that it had at first."""

from swinv2_train.make_shards import main

if __name__ == "__main__":
    main()
