"""Image and text in transformers' framework: a tiny CLIP with both towers as mixtures, on generated pairs."""

import sys

import torch
from transformers import CLIPConfig, CLIPModel

import ewavit as ewa
from ewavit.data.shapes import make_shapes

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 60
BATCH, START, END = 16, 1, 2
COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0), "white": (1, 1, 1)}
WORDS = ("shapes", "in", *COLOURS)
tower = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
text = {"vocab_size": 3 + len(WORDS), "max_position_embeddings": 8, "bos_token_id": START,
        "eos_token_id": END, "pad_token_id": 0}  # fmt: skip
config = CLIPConfig(
    text_config=tower | text, vision_config=tower | {"image_size": 32, "patch_size": 4}, projection_dim=32
)


def tokens(name: str) -> list[int]:
    return [START, *(3 + WORDS.index(word) for word in ("shapes", "in", name)), END]


def painted(masks, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of shapes in one colour on grey, with noise, and the numbers of the colours."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(COLOURS), (len(masks),), generator=generator)
    colours = torch.tensor(list(COLOURS.values()))[labels].view(-1, 3, 1, 1) * 2.0 - 1
    images = torch.where(torch.from_numpy(masks)[:, None] > 0, colours, 0.0)
    return images + 0.5 * torch.randn(images.shape, generator=generator), labels


prompts = torch.tensor([tokens(name) for name in COLOURS])
_, masks, _, held = make_shapes()
train, test = painted(masks, 0), painted(held, 1)


@torch.no_grad()
def zero_shot(model: CLIPModel) -> float:
    """The share, in percent, of test images whose colour has the most similar text."""
    logits = model.eval()(input_ids=prompts, pixel_values=test[0]).logits_per_image
    return 100 * float((logits.argmax(1) == test[1]).float().mean())


torch.manual_seed(0)
model = CLIPModel(config)
ewa.expand(model, 2, select="all")  # the FFNs of both towers
optimizer = torch.optim.AdamW(ewa.param_groups(model, weight_decay=0.05), lr=1e-3)
ewa.ExpertAveraging(model, share_rate=0.3, ramp_steps=steps // 2).attach(optimizer)
print(f"zero-shot before: {zero_shot(model):.0f} %")
model.train()
for _ in range(steps):
    chosen = torch.randint(len(train[0]), (BATCH,))
    labels = train[1][chosen]
    logits = model(input_ids=prompts, pixel_values=train[0][chosen]).logits_per_image  # (images, prompts)
    of_texts = logits.T.log_softmax(1)  # several images fit one text
    fits = torch.nn.functional.one_hot(labels, len(prompts)).T.float()
    loss = torch.nn.functional.cross_entropy(logits, labels)
    loss = loss - (of_texts * fits).sum(1).div(fits.sum(1).clamp(min=1)).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()  # averages the experts
print(f"zero-shot after {steps} steps: {zero_shot(model):.0f} %")
ewa.collapse(model).save_pretrained("clip")
print(f"stock model: {zero_shot(CLIPModel.from_pretrained('clip')):.0f} %")
