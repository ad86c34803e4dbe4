"""Cats against dogs: the classic `finetune()` and `fit()` on the penultimate features of VGG16.

The course's `vgg.finetune(batches)` drops the last layer, freezes the others and puts a new last layer on;
`vgg.fit(batches, val_batches)` trains it by RMSprop. Here the 4,096 features of each picture are computed once.

    python cats_dogs_finetune.py PHOTOS [--backbone mobilenetv2_100 --weights FILE] [--seeds 0,1,2] [--epochs-scale 1]
"""

# %%
from dataclasses import replace

import headstart
from common import options, read, record, scaled, settings, show, show_lines
from headstart import Recipe, Stage

args = read(options("cats_dogs_finetune", backbone="vgg16", image_size=224))
pictures = {"image_size": args.image_size, "interpolation": "bilinear"}

# %% [markdown]
# ## finetune()
#
# The default pooling is the network's own: of VGG16 everything but the last layer is kept, its two fully connected
# layers too.

# %%
table = headstart.load_images(args.photos)
splits = headstart.split(table if args.limit is None else table.limit(args.limit), seed=args.seeds[0])
model = headstart.create_classifier(args.backbone, splits.class_names, weights=args.weights, **pictures)
print(headstart.set_freeze_line(model, "head").describe())

# %% [markdown]
# ## fit()
#
# Keras's RMSprop (rho .9, epsilon 1e-7) at its rate of 0.001, without augmentation.

# %%
stage = Stage(epochs=10, batch_size=64, optimizer="rmsprop", weight_decay=0, schedule="constant")
result = headstart.fit(
    model, splits, replace(stage, epochs=scaled(args, stage.epochs)), lr=1e-3, augment="none", seed=args.seeds[0]
)
print(f"best epoch {result.best_epoch}: validation loss {result.best.loss:.4f}, accuracy {result.best.accuracy:.4f}")
print(f"test accuracy {headstart.evaluate(model, splits.test).metrics['accuracy']:.4f}")

# %% [markdown]
# ## The same as recipes, over several seeds
#
# Beside it: the same features, the head in closed form (ridge regression) before the first step.

# %%
rmsprop = Recipe(name="finetune + fit", lr=1e-3, augment="none", stages=(stage,))
ridge = replace(rmsprop, name="closed form first", stages=(replace(stage, warm_start="ridge"),))
recipes = (rmsprop, ridge)
show_lines(args, rmsprop)
comparison = headstart.compare(args.photos, recipes=recipes, spec_overrides=pictures, **settings(args, recipes))
show(comparison)

# %%
record(args, comparison, recipes)
