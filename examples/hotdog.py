"""Hot dog or not: a pretrained ResNet-18 trained as a whole, the new head ten times faster, against one from scratch.

After "Dive into Deep Learning": plain SGD, five epochs, batches of 128, random crops and flips, no frozen stage.

    python hotdog.py PHOTOS [--backbone mobilenetv2_100 --weights FILE --image-size 128] [--seeds 0,1,2]
"""

# %%
from dataclasses import replace

import headstart
from common import options, read, record, run_folder, settings, show, show_lines
from headstart import AugmentSpec, Recipe, Stage

args = read(options("hotdog", backbone="resnet18", image_size=224))

# %% [markdown]
# ## Everything at once, the head ten times faster
#
# `head_lr_multiplier=10` gives the new layer ten times the backbone's rate. `batchnorm="train"` learns the statistics,
# as the book's plain loop does. The book's SGD has no momentum; here it has 0.9, which makes every step ten times as
# long in the end. So the book's 0.01 is 0.001 here. Beside it the same with the rate as it is printed.

# %%
joint = Stage(
    name="joint", freeze_line="all", batchnorm="train", epochs=5, batch_size=128, optimizer="sgd",
    head_lr_multiplier=10, weight_decay=0.001, schedule="constant",
)  # fmt: skip
crops = AugmentSpec(crop_scale=(0.08, 1.0), hflip=0.5)
fine_tuned = Recipe(name="joint", lr=0.01 / 10, augment=crops, stages=(joint,))
as_printed = replace(fine_tuned, name="joint, rate as printed", lr=0.01)

# %% [markdown]
# ## From scratch
#
# Random weights, one rate for all of them, ten times as high: the book's 0.1.

# %%
everything = replace(joint, name="scratch", head_lr_multiplier=1)
scratch = Recipe(name="scratch", pretrained=False, lr=0.1 / 10, augment=crops, stages=(everything,))
recipes = (fine_tuned, as_printed, scratch)
show_lines(args, fine_tuned)

# %%
pictures = {"image_size": args.image_size, "interpolation": "bilinear"}
comparison = headstart.compare(args.photos, recipes=recipes, spec_overrides=pictures, **settings(args, recipes))
show(comparison)

# %% [markdown]
# The histories, where a rate that is too high shows at once.

# %%
for recipe in recipes:
    history = headstart.read_run(run_folder(comparison, recipe.name)).history
    print(f"{recipe.name:<24} validation loss by epoch: {[round(one['val']['loss'], 3) for one in history]}")

# %%
record(args, comparison, recipes)
