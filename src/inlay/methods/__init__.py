"""What is learned. One file is one method; `base.py` holds the contracts they obey."""
