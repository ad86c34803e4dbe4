"""Cats against dogs from 2,000 pictures: VGG16 at 180 x 180 as a feature extractor, then its last block fine-tuned.

After "Deep Learning with Python": features without augmentation; with augmentation; then `block5` at a rate of 1e-5.
It takes pictures of two classes, since the book's head ends in one sigmoid output.

    python vgg16_180.py PHOTOS [--seeds 0,1,2] [--epochs-scale 0.2]
    python vgg16_180.py PHOTOS --backbone resnet18 --last-block layer4
    python vgg16_180.py PHOTOS --backbone mobilenetv2_100 --weights FILE --features-from blocks.6 --last-block blocks.6
"""

# %%
from dataclasses import replace

import headstart
from common import options, read, record, settings, show, show_lines
from headstart import AugmentSpec, HeadSpec, HiddenLayer, Recipe, Stage

parser = options("vgg16_180", backbone="vgg16", image_size=180)
parser.add_argument("--features-from", help="an earlier block of another backbone, so that its map is not too wide")
parser.add_argument("--last-block", default="block5", help="where fine-tuning begins; VGG has Keras's names")
parser.add_argument("--views", type=int, default=4, help="stored views of each picture")
args = read(parser)

# %% [markdown]
# ## Flatten - Dense(256) - Dropout(.5) - sigmoid
#
# The 5 x 5 x 512 map of VGG16 is flattened to 12,800 features. The book's `Dense(256)` has no activation: "none". One
# sigmoid output for two classes is trained as binary cross-entropy.

# %%
book_head = HeadSpec(
    pool="flatten", hidden=(HiddenLayer(256, "none", dropout=0.5),), output="sigmoid", features_from=args.features_from
)
rmsprop = Stage(epochs=20, batch_size=32, optimizer="rmsprop", weight_decay=0, schedule="constant", views=args.views)
features = Recipe(name="features", lr=1e-3, head=book_head, augment="none", stages=(rmsprop,))

# %% [markdown]
# ## With augmentation
#
# Keras's `RandomRotation(.1)` is a tenth of a full turn: 36 degrees either way; what comes in over the border is
# reflected, as there. `RandomZoom(.2)` is a fifth in or out. Four views of each picture are stored in place of a new
# one in every epoch; `--views` for more.

# %%
turned = AugmentSpec(hflip=0.5, rotation=36, zoom=0.2)
augmented = replace(features, name="augmented", augment=turned, stages=(replace(rmsprop, epochs=50),))

# %% [markdown]
# ## The last block
#
# Of each stage the state with the best validation loss is kept, which is what the book's `ModelCheckpoint` does. The
# line at `block5` leaves three convolutions trainable; Keras's `layers[:-4]` says the same and counts a pooling layer.

# %%
last = replace(rmsprop, name="last block", freeze_line=args.last_block, epochs=30, lr_scale=0.01)
tuned = replace(augmented, name="fine-tuned", stages=(*augmented.stages, last))
recipes = (features, augmented, tuned)
show_lines(args, tuned)

# %%
pictures = {"image_size": args.image_size, "interpolation": "bilinear", "fit": "squash", "crop_pct": 1.0}
comparison = headstart.compare(args.photos, recipes=recipes, spec_overrides=pictures, **settings(args, recipes))
show(comparison)

# %%
record(args, comparison, recipes)
