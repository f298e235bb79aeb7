"""What a user's value is: its plain form, digest and pickle, large objects, and the base of public models."""
