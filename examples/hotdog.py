"""Hot dog or not: a pretrained ResNet-18 trained as a whole, the new head ten times faster, against one from scratch.

After "Dive into Deep Learning": plain SGD, five epochs, batches of 128, random crops and flips, no frozen stage.

    python hotdog.py PHOTOS [--backbone mobilenetv2_100 --weights FILE --image-size 128] [--seeds 0,1,2]
"""

# %%
from dataclasses import replace

import headstart
from common import options, read, record, settings, show, show_lines
from headstart import AugmentSpec, Recipe, Stage

args = read(options("hotdog", backbone="resnet18", image_size=224))

# %% [markdown]
# ## Everything at once, the head ten times faster
#
# `head_lr_multiplier=10` gives the new layer 0.1 where the backbone has 0.01. `batchnorm="train"` learns the
# statistics, as the book's plain PyTorch loop does. SGD has a momentum of 0.9 here, which the book's has not.

# %%
joint = Stage(
    name="joint", freeze_line="all", batchnorm="train", epochs=5, batch_size=128, optimizer="sgd",
    head_lr_multiplier=10, weight_decay=0.001, schedule="constant",
)  # fmt: skip
crops = AugmentSpec(crop_scale=(0.08, 1.0), hflip=0.5)
fine_tuned = Recipe(name="joint", lr=0.01, augment=crops, stages=(joint,))

# %% [markdown]
# ## From scratch
#
# Random weights, one rate for all of them, ten times as high.

# %%
everything = replace(joint, name="scratch", head_lr_multiplier=1)
scratch = Recipe(name="scratch", pretrained=False, lr=0.1, augment=crops, stages=(everything,))
recipes = (fine_tuned, scratch)
show_lines(args, fine_tuned)

# %%
pictures = {"image_size": args.image_size, "interpolation": "bilinear"}
comparison = headstart.compare(args.photos, recipes=recipes, spec_overrides=pictures, **settings(args, recipes))
show(comparison)

# %%
record(args, comparison, recipes)
