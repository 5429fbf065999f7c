"""The report page of evaluations: systems, comparison, figures, examples, and the page itself."""
