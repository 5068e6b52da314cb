"""Speculative decoding: drafts of tokens that rows may sample next (docs/speculation.md).

- `suffix_index`: where each run of tokens occurs in a text that grows
- `proposers`: the two ways to continue a text, n-gram lookup and suffix decoding
- `draft_length`: how long a draft pays
- `drafter`: which rows have drafts, and which tokens of these were right; the engine's `Speculation`
"""
