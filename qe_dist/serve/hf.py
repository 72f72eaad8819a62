"""python -m qe_dist.serve.hf ...: the command line `transformers`, which knows our checkpoints then.

transformers looks for no plug-ins, so somebody has to import qe_dist before it loads a model.
"""

from transformers.cli.transformers import main

if __name__ == "__main__":
    main()
