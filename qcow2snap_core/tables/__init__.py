"""Answers from the tables alone: what differs, what it costs, who shares it, what is damaged."""
