"""Dog breeds with EfficientNet-B0: from scratch, a head, the top of the backbone, and a table of rates and decays.

Pictures are squashed to 224 x 224, in batches of 64, turned, moved, and flipped on both axes, as in the Keras example
and the course notebook that follows it.

    python dog_breeds.py PHOTOS [--seeds 0,1,2] [--budget scratch=10@96]
    python dog_breeds.py PHOTOS --backbone mobilenetv2_100 --weights FILE
    python dog_breeds.py PHOTOS --backbone resnet18 --top layer4
"""

# %%
from dataclasses import replace

import matplotlib.pyplot as plt

import headstart
from common import options, read, record, run_folder, scaled, settings, show, show_lines
from headstart import AugmentSpec, HeadSpec, Recipe, Space, Stage

parser = options("dog_breeds", backbone="efficientnet_b0", image_size=224)
parser.add_argument("--top", default="blocks.6*", help="where fine-tuning begins: a block of the backbone")
args = read(parser)

# %% [markdown]
# ## From scratch
#
# Keras's rotation .15 is 54 degrees either way; what comes in over the border is reflected. `batchnorm="train"` learns
# BatchNorm's statistics, which a network from scratch needs.

# %%
turned = AugmentSpec(rotation=54, translation=0.1, contrast=0.1, hflip=0.5, vflip=0.5)
keras_head = HeadSpec(pool="avg", batchnorm=True, dropout=0.2)
adam = Stage(name="scratch", freeze_line="all", batchnorm="train", epochs=30, batch_size=64, optimizer="adam",
             weight_decay=0, schedule="constant")  # fmt: skip
scratch = Recipe(name="scratch", pretrained=False, lr=1e-3, head=keras_head, augment=turned, stages=(adam,))

# %% [markdown]
# ## The head, with and without augmentation
#
# GAP - BatchNorm - Dropout - Dense. Keras's `weight_decay` is decoupled from the gradient, as it always is here.

# %%
on_top = Stage(epochs=30, batch_size=64, optimizer="adamw", weight_decay=0.01, schedule="constant")
head = Recipe(name="head", lr=1e-4, head=keras_head, augment=turned, stages=(on_top,))
plain = replace(head, name="head, not augmented", augment="none")

# %% [markdown]
# ## The top of the backbone
#
# "The last 20 layers, BatchNorm left out" is `blocks.6*` onward with frozen BatchNorm on a B0. Its rate is a tenth.

# %%
top = replace(on_top, name="top", freeze_line=args.top, batchnorm="frozen", epochs=10, lr_scale=0.1)
tuned = replace(head, name="fine-tuned", stages=(on_top, top))
recipes = (scratch, head, plain, tuned)
show_lines(args, tuned)

# %%
pictures = {"image_size": args.image_size, "interpolation": "bilinear", "fit": "squash", "crop_pct": 1.0}
comparison = headstart.compare(args.photos, recipes=recipes, spec_overrides=pictures, **settings(args, recipes))
show(comparison)

# %% [markdown]
# ## History and mistakes
#
# The history with top-5 (top-1 where there are five classes or fewer), and the test split's confusion on a logarithmic
# scale, so that rare mistakes are seen beside the many right answers.

# %%
run = headstart.read_run(run_folder(comparison, "fine-tuned"))
figure, axes = plt.subplots(1, 3, figsize=(18, 5), layout="constrained")
headstart.plot_history(run, "loss", ax=axes[0])
headstart.plot_history(run, "accuracy" if run.metrics["test"]["top5"] is None else "top5", ax=axes[1])
headstart.plot_confusion(run, ax=axes[2])
figure.savefig(args.out / "dog_breeds.png")

# %% [markdown]
# ## Rates and decays of the head
#
# The notebook's five trials, ten epochs each, beside its own accuracies; `headstart sweep --preset course` is the same
# table. The trials share the stored features, and the test split is not looked at.

# %%
rows = ((1e-2, 0.0, 0.7898), (1e-2, 1e-3, 0.7853), (1e-2, 1e-2, 0.7931), (1e-3, 1e-2, 0.8180), (1e-4, 1e-2, 0.8108))
space = Space(
    points=tuple({"lr": rate, "weight_decay": decay} for rate, decay, _ in rows), published=tuple(p for *_, p in rows)
)
found = headstart.sweep(
    args.photos, space=space, recipe=replace(head, seed=args.seeds[0]), epochs=scaled(args, 10), prune=False,
    backbone=args.backbone, weights=args.weights, spec_overrides=pictures, limit=args.limit, out=args.out / "sweep",
    overwrite=args.overwrite,
)  # fmt: skip
for trial in found.results["trials"]:
    asked, ours = trial["values"], trial["val"]["accuracy"]
    print(f"rate {asked['lr']:g}, decay {asked['weight_decay']:g}: {ours:.4f}; the notebook: {trial['published']:.4f}")

# %%
record(args, comparison, recipes, sweep=found)
