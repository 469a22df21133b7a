"""What the parts of ExpertScale cost, each against something measured in the same run; see README.md here."""

import os

# Here, as transformers looks at it when imported: bars of loading weights would run over the lines of progress.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
