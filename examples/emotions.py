"""Angry, happy or sad: what happens when the rate stays the same as the backbone is unfrozen.

The tutorial puts GAP - Dense 1024 - BatchNorm - Dense 128 - Dense 3 on an EfficientNet, trains that head, then
unfreezes the backbone. With the rate left as it was, that wrecks what the head has learned; divided by 100 it helps.

    python emotions.py PHOTOS [--backbone mobilenetv2_100 --weights FILE] [--seeds 0,1,2] [--epochs-scale 0.1]
"""

# %%
from dataclasses import replace

import headstart
from common import options, read, record, run_folder, settings, show, show_lines
from headstart import AugmentSpec, HeadSpec, HiddenLayer, Recipe, Stage

args = read(options("emotions", backbone="efficientnet_b4", image_size=256))

# %% [markdown]
# ## The head
#
# `batchnorm="after"` puts BatchNorm behind the activation, as in the tutorial. Keras's factors are fractions: its
# `RandomRotation(.025)` is 9 degrees here. The frozen backbone sees each view of a picture once, not once per epoch.
# Validation accuracy chooses the state that is kept: so wide a head is soon too sure of itself, and the loss alone
# would take an early one.

# %%
head = Recipe(
    name="head",
    lr=1e-3,
    head=HeadSpec(pool="avg", hidden=(HiddenLayer(1024, batchnorm="after"), HiddenLayer(128))),
    augment=AugmentSpec(rotation=9, hflip=0.5, contrast=0.1),
    stages=(Stage(epochs=20, batch_size=32, optimizer="adam", weight_decay=0, schedule="constant", select="accuracy"),),
)

# %% [markdown]
# ## The whole network, three times
#
# First at the head's own rate. The first steps are watched: when the validation loss is wrecked, the stage is rolled
# back to the trained head (`on_collapse="stop"`; the default would try again at a tenth of the rate).
# Then at a hundredth of it, with BatchNorm's statistics fixed. Then the same in training mode, which is what Keras
# does to a model that is unfrozen without `training=False`. Choosing the best state would hide the harm, since what the
# stage began with takes part: these two keep their last epoch (`select="last"`), as the tutorial's loop does.

# %%
everything = replace(head.stages[0], name="everything", freeze_line="all", on_collapse="stop")
same_rate = replace(head, name="same rate", stages=(*head.stages, everything))
careful = replace(everything, lr_scale=0.01, select="last", on_collapse="ignore")
hundredth = replace(head, name="rate / 100", stages=(*head.stages, careful))
training_mode = replace(head, name="training mode", stages=(*head.stages, replace(careful, batchnorm="train")))
recipes = (head, same_rate, hundredth, training_mode)
show_lines(args, hundredth)

# %% [markdown]
# ## Side by side
#
# The head is trained once per seed; the other three go on from it.

# %%
pictures = {"image_size": args.image_size, "interpolation": "bilinear"}
comparison = headstart.compare(args.photos, recipes=recipes, spec_overrides=pictures, **settings(args, recipes))
show(comparison)

# %% [markdown]
# The message of the roll-back says how bad it was; the histories, what each epoch did with fixed and with learned
# statistics.

# %%
for name in ("rate / 100", "training mode"):
    history = headstart.read_run(run_folder(comparison, name)).history
    losses = [round(one["val"]["loss"], 3) for one in history if one["stage"] == "everything"]
    print(f"{name:<14} validation loss by epoch: {losses}")

# %%
record(args, comparison, recipes)
