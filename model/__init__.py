"""Networks as three lists (enc, mid, dec) over five injected verbs."""
