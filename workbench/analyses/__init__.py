"""Analyses: a file a question, each one public function that returns one frozen result."""
