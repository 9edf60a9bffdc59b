"""Commands, each run as `python -m tools.NAME`; nothing else imports them."""
