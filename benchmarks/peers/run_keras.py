"""Keras 3 on TensorFlow: a head on frozen MobileNetV2, 30 epochs, then the top 20 layers without BatchNorm, 10 epochs.

After Keras's guide https://keras.io/guides/transfer_learning and its example of fine-tuning
https://keras.io/examples/vision/image_classification_efficientnet_fine_tuning: rotation 0.15, translation 0.1, flip and
contrast 0.1; pooling - BatchNorm - dropout 0.2 - dense; the base always called with training=False. Adam at 1e-3 with
weight decay 0.01, then 1e-5. Pictures are resized to a square (as image_dataset_from_directory does), decoded once and
cached in memory.
The flip is horizontal only, which is kinder to photographs than the example's. The last state is kept.

The network computes what timm's does: the weights are carried over layer by layer, padding and BatchNorm's epsilon are
timm's, and its features and logits are compared with timm's on real pictures before anything is trained.
Variant `step N NETWORK`: see `steps`; benchmarks/step.py asks for it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from runner_common import IMAGE_SIZE, LOADERS, MEAN, STD, Clock, Pictures, arguments, finish, read_splits
from safetensors.numpy import load_file

EPOCHS, TOP_EPOCHS, TOP, BATCH = 30, 10, 20, 32
TOLERANCE = 1e-3
Weights = dict[str, np.ndarray]
UNTRAINED = {"mobilenetv3_small_100": "MobileNetV3Small", "efficientnet_b0": "EfficientNetB0"}
"""By timm's name, the networks of keras.applications whose steps are timed as they are, with random weights."""


def create_base() -> keras.Model:
    """Keras's MobileNetV2 without its top, padded evenly on both sides and with epsilon 1e-5, as PyTorch's is.

    Takes normalised pictures [N, 226, 226, 3] that carry one pixel of padding on each side.
    """
    original = keras.applications.MobileNetV2(
        input_shape=(IMAGE_SIZE, IMAGE_SIZE, 3), include_top=False, weights=None
    )  # fmt: skip

    def convert(layer: layers.Layer) -> layers.Layer:
        config = layer.get_config()
        if isinstance(layer, layers.ZeroPadding2D):
            config["padding"] = ((1, 1), (1, 1))
        if isinstance(layer, layers.BatchNormalization):
            config["epsilon"] = 1e-5
        if layer.name == "Conv1":
            config["padding"] = "valid"
        return layer.__class__.from_config(config)

    door = keras.Input((IMAGE_SIZE + 2, IMAGE_SIZE + 2, 3))
    return keras.models.clone_model(original, input_tensors=door, clone_function=convert)


def timm_names() -> list[tuple[str, str, str, str]]:
    """(Keras convolution, its BatchNorm, timm's convolution, timm's BatchNorm), in order."""
    names = [("Conv1", "bn_Conv1", "conv_stem", "bn1")]
    blocks = [(0, 0), *((stage, i) for stage, n in enumerate((2, 3, 4, 3, 3, 1), start=1) for i in range(n))]
    for number, (stage, i) in enumerate(blocks):
        mine, theirs = f"block_{number}_" if number else "expanded_conv_", f"blocks.{stage}.{i}."
        parts = ("depthwise", "project") if number == 0 else ("expand", "depthwise", "project")
        convolutions = ("conv_dw", "conv_pw") if number == 0 else ("conv_pw", "conv_dw", "conv_pwl")
        for k, (part, convolution) in enumerate(zip(parts, convolutions, strict=True), start=1):
            names.append((f"{mine}{part}", f"{mine}{part}_BN", f"{theirs}{convolution}", f"{theirs}bn{k}"))
    return [*names, ("Conv_1", "Conv_1_bn", "conv_head", "bn2")]


def carry_over(base: keras.Model, weights: Weights) -> None:
    """Fill the base with timm's weights; every backbone tensor is used once."""
    used = set()
    for convolution, norm, their_convolution, their_norm in timm_names():
        kernel = weights[f"{their_convolution}.weight"]
        depthwise = isinstance(base.get_layer(convolution), layers.DepthwiseConv2D)
        # PyTorch: out, in / groups, height, width. Keras: height, width, in, out, or channels, 1 where depthwise.
        base.get_layer(convolution).set_weights([kernel.transpose((2, 3, 0, 1) if depthwise else (2, 3, 1, 0))])
        parts = [f"{their_norm}.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
        base.get_layer(norm).set_weights([weights[part] for part in parts])
        used |= {f"{their_convolution}.weight", *parts}
    left = {name for name in weights if not name.endswith("num_batches_tracked")} - used
    assert left == {"classifier.weight", "classifier.bias"}, left


def check(base: keras.Model, weights: Weights, reference: Weights) -> dict[str, float]:
    """Largest differences from timm's features and logits, relative to their largest value."""
    pictures = np.pad(reference["pictures"].transpose(0, 2, 3, 1), ((0, 0), (1, 1), (1, 1), (0, 0)))
    features = base(pictures, training=False).numpy()
    logits = features.mean((1, 2)) @ weights["classifier.weight"].T + weights["classifier.bias"]
    found = {"features": features.transpose(0, 3, 1, 2), "logits": logits}
    differences = {
        name: float(np.abs(value - reference[name]).max() / np.abs(reference[name]).max())
        for name, value in found.items()
    }
    assert max(differences.values()) < TOLERANCE, differences
    return differences


def create_model(base: keras.Model, num_classes: int) -> keras.Model:
    """Pixels 0-255 in, probabilities out."""
    inputs = keras.Input((IMAGE_SIZE, IMAGE_SIZE, 3))
    x = layers.Normalization(mean=[255 * m for m in MEAN], variance=[(255 * s) ** 2 for s in STD])(inputs)
    edge = (base.input_shape[1] - IMAGE_SIZE) // 2
    x = base(layers.ZeroPadding2D(edge)(x) if edge else x, training=False)
    x = layers.BatchNormalization()(layers.GlobalAveragePooling2D()(x))
    outputs = layers.Dense(num_classes, activation="softmax")(layers.Dropout(0.2)(x))
    return keras.Model(inputs, outputs)


def dataset(pictures: Pictures, *, training: bool, seed: int) -> tf.data.Dataset:
    """Batches of pixels and class ids; training pictures are shuffled and augmented anew in each epoch."""
    change = keras.Sequential(
        [
            layers.RandomRotation(0.15),
            layers.RandomTranslation(0.1, 0.1),
            layers.RandomFlip("horizontal"),
            layers.RandomContrast(0.1),
        ]
    )

    def read(path: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        image = tf.io.decode_image(tf.io.read_file(path), channels=3, expand_animations=False)
        return tf.image.resize(image, (IMAGE_SIZE, IMAGE_SIZE)), label

    paths, labels = zip(*pictures, strict=True)
    data = tf.data.Dataset.from_tensor_slices((list(paths), list(labels))).map(read, LOADERS).cache()
    if training:
        data = data.shuffle(len(pictures), seed=seed)
    data = data.batch(BATCH)
    if training:
        data = data.map(lambda images, labels: (change(images, training=True), labels), LOADERS)
    options = tf.data.Options()
    options.threading.private_threadpool_size = LOADERS
    return data.prefetch(tf.data.AUTOTUNE).with_options(options)


class Watch(keras.callbacks.Callback):
    """Tells the clock of each epoch."""

    def __init__(self, clock: Clock, phase: str) -> None:
        super().__init__()
        self.clock, self.phase = clock, phase

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self.clock.epoch(self.phase, (logs or {})["val_accuracy"])


def prepare(args: argparse.Namespace) -> None:
    tf.config.threading.set_intra_op_parallelism_threads(args.threads)
    tf.config.threading.set_inter_op_parallelism_threads(args.threads)
    keras.utils.set_random_seed(args.seed)


def compile_model(model: keras.Model, rate: float) -> None:
    model.compile(
        keras.optimizers.Adam(rate, weight_decay=0.01), loss="sparse_categorical_crossentropy", metrics=["accuracy"]
    )


def steps(args: argparse.Namespace) -> None:
    """Time `train_on_batch`, everything trained, for batch size and network in `args.variant` ("step 16 NETWORK").

    For each line with a number on standard input that many steps are made, so that those of several tools alternate;
    their seconds, of the wall and of the processor, are printed.
    """
    _, size, network = args.variant.split()
    batch = int(size)
    if network in UNTRAINED:
        create = getattr(keras.applications, UNTRAINED[network])
        base = create(input_shape=(IMAGE_SIZE, IMAGE_SIZE, 3), include_top=False, weights=None)
    else:
        base = create_base()
        carry_over(base, load_file(args.weights))
    model = create_model(base, 10)
    compile_model(model, 1e-5)
    rng = np.random.default_rng(args.seed)
    images = rng.integers(0, 256, (batch, IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.float32)
    labels = np.arange(batch) % 10
    print("ready", flush=True)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            started, busy = time.perf_counter(), time.process_time()
            model.train_on_batch(images, labels)
            seconds.append((time.perf_counter() - started, time.process_time() - busy))
        print(json.dumps(seconds), flush=True)


def main() -> None:
    args = arguments()
    prepare(args)
    if args.variant.startswith("step"):
        steps(args)
        return
    clock = Clock()
    class_names, splits = read_splits(args.splits, args.root)
    base, weights = create_base(), load_file(args.weights)
    carry_over(base, weights)
    agreement = check(base, weights, dict(np.load(args.reference)))
    model = create_model(base, len(class_names))
    data = {name: dataset(part, training=name == "train", seed=args.seed) for name, part in splits.items()}

    quiet = {"validation_data": data["val"], "verbose": 0}
    clock.begins()

    base.trainable = False
    compile_model(model, 1e-3)
    model.fit(data["train"], epochs=args.epochs or EPOCHS, callbacks=[Watch(clock, "head")], **quiet)
    clock.head_ends()

    base.trainable = True
    for i, layer in enumerate(base.layers):
        on_top = i >= len(base.layers) - TOP
        layer.trainable = on_top and not isinstance(layer, layers.BatchNormalization)
    compile_model(model, 1e-5)
    model.fit(
        data["train"], epochs=args.epochs or TOP_EPOCHS, callbacks=[Watch(clock, "all")], **quiet
    )  # fmt: skip
    preds = [] if args.epochs else model.predict(data["test"], verbose=0).argmax(1).tolist()
    finish(
        clock, planned={"head": EPOCHS, "all": TOP_EPOCHS},
        val_accuracy=clock.curve[-1]["val_accuracy"], preds=preds, test=splits["test"],
        packages=("keras", "tensorflow-cpu", "numpy"),
        settings={
            "epochs": EPOCHS, "top_epochs": TOP_EPOCHS, "top_layers": TOP, "batch": BATCH, "agreement": agreement,
            "top_trainable": sum(bool(layer.trainable_weights) for layer in base.layers),
            "jit_compile": bool(model.jit_compile),
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
