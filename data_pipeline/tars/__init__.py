"""WebDataset tars as they are: walked, divided into samples, checked, and indexed where they lie."""
