"""PaSS by hand: what a model foresees through its look-ahead embeddings, beside what it then really says.

python examples/pass_by_hand.py "The capital of France is"
"""

import sys

import shoestring
from shoestring.engine.runner import Outputs
from shoestring.engine.sampling import SamplingOptions
from shoestring.engine.tokentree import NO_TOKEN, TokenTree

prompt = sys.argv[1] if len(sys.argv) > 1 else "The capital of France is"
model = shoestring.load("smollm2-135m")
look_ahead = model.look_ahead
assert look_ahead is not None, "the default model's embeddings come with the package"
tokens, ahead = model.encode(prompt), len(look_ahead)

# One call: the text, and behind it rows that stand for no token.
last = len(tokens) - 1
tree = TokenTree(
    [*tokens, *[NO_TOKEN] * ahead],
    range(-1, last + ahead),
    embeddings={last + 1 + place: look_ahead.embeddings[place] for place in range(ahead)},
)
model.runner.open(0, SamplingOptions())
results = model.runner.step({0: tree}, Outputs(top_k=3))[0]
exact = results.next_token(last)
foreseen = [results.top_k(last + 1 + place) for place in range(ahead)]
model.runner.commit({0: range(last + 1)})  # the text's rows are kept, the look-ahead rows are not
model.runner.release(0)

said = model.generate(prompt, decoding="autoregressive", max_new_tokens=ahead + 1).token_ids
print(f"{prompt!r} goes on with {model.tokenizer.decode([exact])!r}, which is exact. Beyond it:")
for place, (candidates, token) in enumerate(zip(foreseen, said[1:], strict=False), 2):
    texts = ", ".join(repr(model.tokenizer.decode([candidate])) for candidate in candidates)
    mark = "yes" if token == candidates[0] else "among them" if token in candidates else "no"
    print(f"  token {place}: foreseen {texts}; said {model.tokenizer.decode([token])!r}: {mark}")
