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
# as the book's plain loop does. `momentum=0` is its plain SGD; its decay of 0.001 is then the same as here, where it is
# decoupled, but that norms and biases are left out. (The book's PyTorch code prints 5e-5 for a loss that is summed over
# batches of 128: 0.0064 for their mean, which is what rates mean here.)

# %%
joint = Stage(
    name="joint", freeze_line="all", batchnorm="train", epochs=5, batch_size=128, optimizer="sgd", momentum=0,
    head_lr_multiplier=10, weight_decay=0.001, schedule="constant",
)  # fmt: skip
crops = AugmentSpec(crop_scale=(0.08, 1.0), hflip=0.5)
fine_tuned = Recipe(name="joint", lr=0.01, augment=crops, stages=(joint,))

# %% [markdown]
# Momentum makes every step 1 / (1 - momentum) times as long in the end. This is the same rate with the usual 0.9, ten
# times too high then:

# %%
with_momentum = replace(fine_tuned, name="joint, momentum 0.9", stages=(replace(joint, momentum=0.9),))

# %% [markdown]
# ## From scratch
#
# Random weights, one rate for all of them, ten times as high: the book's 0.1.

# %%
everything = replace(joint, name="scratch", head_lr_multiplier=1)
scratch = Recipe(name="scratch", pretrained=False, lr=0.1, augment=crops, stages=(everything,))
recipes = (fine_tuned, with_momentum, scratch)
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
