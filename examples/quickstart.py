"""The shortest use: patch a model, make prompts with chunks, call plain `generate`.

python examples/quickstart.py
"""

import hfblend
from hfblend.demo.demo import demo_data
from hfblend.demo.model import load

model, tokenizer = load()  # SmolLM2-135M-Instruct; or your own decoder-only model
data = demo_data()
documents = [passage["text"] + "\n\n" for passage in data["passages"]]
question = "{documents}What is the main ingredient of pellow soup?"
messages = [{"role": "system", "content": data["system"]}, {"role": "user", "content": question}]

with hfblend.patch(model) as blender:
    for chunks in (documents, documents[::-1]):  # the second call finds every chunk, in another order
        prompt = hfblend.Prompt.from_chat(tokenizer, messages, chunks)
        output = model.generate(**prompt.inputs(model.device), max_new_tokens=12, do_sample=False)
        print(tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True))
        print(blender.trace)
