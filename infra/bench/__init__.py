"""What the parts of ExpertScale cost, each against something measured in the same run; see README.md here."""
