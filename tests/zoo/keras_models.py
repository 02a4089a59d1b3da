"""Programs of the zoo: kinds of models and layers."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import layers, ops

from zoo.programs import Par, images, program, tokens, vectors

SPARSE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def trained(
    par: Par, model: Any, x: Any, y: Any, loss: Any = SPARSE, optimizer: Any = None, **fit: Any
) -> dict[str, Any]:
    """What two short epochs, an evaluation and a prediction give; the last batch of each does
    not divide.
    """
    model.compile(
        optimizer or keras.optimizers.SGD(0.05, momentum=0.9),
        loss,
        metrics=fit.pop("metrics", None),
    )
    model = par(model)
    history = model.fit(
        x, y, **{"batch_size": 12, "epochs": 2, "verbose": 0, "shuffle": False, **fit}
    ).history
    return {
        "history": history,
        "weights": model.get_weights(),
        "evaluated": model.evaluate(x, y, batch_size=12, verbose=0, return_dict=True),
        "predicted": model.predict(x, batch_size=12, verbose=0),
    }


@program("Sequential of Dense layers")
def sequential(par: Par) -> Any:
    x, y = vectors()
    model = keras.Sequential(
        [layers.Dense(32, activation="relu"), layers.Dense(16, activation="gelu"), layers.Dense(4)]
    )
    return trained(par, model, x, y, metrics=["accuracy"])


@program("functional: two inputs, two outputs, loss weights, metrics per output")
def two_in_two_out(par: Par) -> Any:
    x, y = vectors()
    a, b = keras.Input((12,), name="a"), keras.Input((12,), name="b")
    h = layers.Concatenate()(
        [layers.Dense(16, activation="relu")(a), layers.Dense(8, activation="tanh")(b)]
    )
    model = keras.Model([a, b], [layers.Dense(4, name="kind")(h), layers.Dense(1, name="size")(h)])
    model.compile(
        "sgd",
        {"kind": SPARSE, "size": "mse"},
        loss_weights={"kind": 1.0, "size": 0.5},
        metrics={"kind": "accuracy"},
    )
    model = par(model)
    targets = {"kind": y, "size": x[:, :1]}
    history = model.fit(
        {"a": x, "b": x[::-1]}, targets, batch_size=12, epochs=2, verbose=0, shuffle=False
    ).history
    return (
        history,
        model.get_weights(),
        model.predict({"a": x, "b": x[::-1]}, batch_size=12, verbose=0),
    )


@program("a layer used twice (siamese)")
def shared_layers(par: Par) -> Any:
    x, _ = vectors()
    tower = keras.Sequential([layers.Dense(16, activation="relu"), layers.Dense(8)])
    a, b = keras.Input((12,)), keras.Input((12,))
    model = keras.Model([a, b], layers.Dot(1, normalize=True)([tower(a), tower(b)]))
    return trained(par, model, [x, x[::-1]], (x[:, :1] > 0).astype("float32"), "mse")


@program("models inside models, three deep")
def nested_models(par: Par) -> Any:
    x, y = vectors()
    inner = keras.Sequential([layers.Dense(8, activation="relu"), layers.Dense(8)], name="inner")
    middle = keras.Sequential([layers.Dense(16), inner, layers.Dense(6)], name="middle")
    return trained(par, keras.Sequential([middle, layers.Dense(4)], name="outer"), x, y)


class Residual(keras.Model):
    """Subclassed, its `call` with arguments of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = layers.Dense(12, activation="relu"), layers.Dense(12)
        self.drop, self.norm, self.head = (
            layers.Dropout(0.3, seed=5),
            layers.BatchNormalization(),
            layers.Dense(4),
        )

    def call(self, x: Any, training: bool = False, scale: float = 1.0) -> Any:
        h = self.drop(self.second(self.first(x)), training=training)
        return self.head(self.norm(x + h * scale, training=training))


@program("subclassed model, call with training and an argument, dropout, batch normalisation")
def subclassed(par: Par) -> Any:
    return trained(par, Residual(), *vectors())


class Clipped(keras.Model):
    """A `train_step` of its own, with compute_loss and the trainer's metrics."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.head = layers.Dense(16, activation="relu"), layers.Dense(4)

    def call(self, x: Any) -> Any:
        return self.head(self.dense(x))

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        return super().compute_loss(x, y, y_pred, sample_weight, training) + 0.01 * ops.mean(
            ops.square(y_pred)
        )


@program("custom compute_loss")
def own_loss(par: Par) -> Any:
    return trained(par, Clipped(), *vectors())


class Stateless(keras.Model):
    """A JAX train_step in Keras's stateless form."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.head = layers.Dense(24, activation="relu"), layers.Dense(4)

    def call(self, x: Any, training: bool = False) -> Any:
        return self.head(self.dense(x))

    def train_step(self, state: Any, data: Any) -> Any:
        import jax

        trainable, other, optimizer, metrics = state
        x, y = data[:2]

        def loss_of(trainable: Any) -> Any:
            out, new = self.stateless_call(trainable, other, x, training=True)
            return self.compute_loss(x, y, out), (out, new)

        (loss, (_, other)), gradients = jax.value_and_grad(loss_of, has_aux=True)(trainable)
        gradients = [g * 0.5 for g in gradients]
        trainable, optimizer = self.optimizer.stateless_apply(optimizer, gradients, trainable)
        return {"loss": loss}, (trainable, other, optimizer, metrics)


@program("train_step written for JAX by the user")
def own_train_step(par: Par) -> Any:
    x, y = vectors()
    model = Stateless()
    model.compile("sgd", SPARSE)
    model = par(model)
    return model.fit(
        x, y, batch_size=12, epochs=2, verbose=0, shuffle=False
    ).history, model.get_weights()


class Gan(keras.Model):
    """Generator and discriminator with an optimizer each, in one train_step."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = keras.Sequential(
            [keras.Input((6,)), layers.Dense(16, activation="relu"), layers.Dense(12)]
        )
        self.discriminator = keras.Sequential(
            [keras.Input((12,)), layers.Dense(16, activation="relu"), layers.Dense(1)]
        )
        self.second = keras.optimizers.SGD(0.02)
        self.seeds = keras.random.SeedGenerator(3)
        self.built = True

    def call(self, x: Any) -> Any:
        return self.discriminator(x)

    def train_step(self, state: Any, data: Any) -> Any:
        import jax
        import jax.numpy as jnp

        trainable, other, optimizer, metrics = state
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        count = len(self.generator.trainable_variables)
        noise = jax.random.normal(jax.random.key(7), (x.shape[0], 6))

        def loss_of(generator: Any, discriminator: Any) -> Any:
            fake, _ = self.generator.stateless_call(generator, [], noise)
            real_score, _ = self.discriminator.stateless_call(discriminator, [], x)
            fake_score, _ = self.discriminator.stateless_call(discriminator, [], fake)
            return (
                jnp.mean(fake_score)
                - jnp.mean(real_score)
                + 0.1 * jnp.mean(real_score**2 + fake_score**2)
            )

        g, d = trainable[:count], trainable[count:]
        loss, (dg, dd) = jax.value_and_grad(loss_of, argnums=(0, 1))(g, d)
        g = [v + 0.02 * dv for v, dv in zip(g, dg, strict=True)]
        new, optimizer = self.optimizer.stateless_apply(
            optimizer, [jnp.zeros_like(v) for v in g] + dd, [*g, *d]
        )
        return {"loss": loss}, (new, other, optimizer, metrics)


@program("GAN: two networks in one train_step")
def gan(par: Par) -> Any:
    x, _ = vectors()
    model = Gan()
    model.compile(keras.optimizers.SGD(0.02))
    model = par(model)
    return model.fit(
        x, batch_size=12, epochs=2, verbose=0, shuffle=False
    ).history, model.get_weights()


class Vae(keras.Model):
    """Variational autoencoder: a sampling layer with a seed generator, add_loss for the
    divergence.
    """

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = layers.Dense(8), layers.Dense(12)
        self.seeds = keras.random.SeedGenerator(11)

    def call(self, x: Any) -> Any:
        mean, log = ops.split(self.encoder(x), 2, axis=-1)
        z = mean + ops.exp(0.5 * log) * keras.random.normal(ops.shape(mean), seed=self.seeds)
        self.add_loss(-0.05 * ops.mean(1 + log - ops.square(mean) - ops.exp(log)))
        return self.decoder(z)


@program("VAE: seeded sampling, add_loss")
def vae(par: Par) -> Any:
    x, _ = vectors()
    model = Vae()
    model.compile("sgd", "mse")
    model = par(model)
    return model.fit(
        x, x, batch_size=12, epochs=2, verbose=0, shuffle=False
    ).history, model.get_weights()


@program("regularizers of weights and activities, constraints")
def regularised(par: Par) -> Any:
    model = keras.Sequential(
        [
            layers.Dense(
                16,
                kernel_regularizer="l2",
                activity_regularizer=keras.regularizers.L1(1e-3),
                activation="relu",
            ),
            layers.Dense(
                8,
                kernel_constraint=keras.constraints.MaxNorm(0.8),
                kernel_regularizer="orthogonal_regularizer",
            ),
            layers.Dense(4, bias_regularizer="l1"),
        ]
    )
    return trained(par, model, *vectors())


@program("LSTM, stacked, with recurrent dropout")
def lstm(par: Par) -> Any:
    x, y = tokens()
    model = keras.Sequential(
        [
            layers.Embedding(24, 8),
            layers.LSTM(8, return_sequences=True, recurrent_dropout=0.2, seed=1),
            layers.LSTM(8),
            layers.Dense(4),
        ]
    )
    return trained(par, model, x, y)


@program("GRU in both directions, masked embedding")
def bidirectional_gru(par: Par) -> Any:
    x, y = tokens()
    x[:, 5:] = 0
    model = keras.Sequential(
        [
            layers.Embedding(24, 8, mask_zero=True),
            layers.Bidirectional(layers.GRU(6, return_sequences=True)),
            layers.GRU(5),
            layers.Dense(4),
        ]
    )
    return trained(par, model, x, y)


@program("RNN of stacked cells, TimeDistributed, RepeatVector")
def recurrent_wrappers(par: Par) -> Any:
    r = np.random.RandomState(0)
    x, y = r.rand(26, 6, 5).astype("float32"), r.rand(26, 6, 3).astype("float32")
    model = keras.Sequential(
        [
            layers.TimeDistributed(layers.Dense(6, activation="relu")),
            layers.RNN([layers.SimpleRNNCell(5), layers.LSTMCell(5), layers.GRUCell(4)]),
            layers.RepeatVector(6),
            layers.SimpleRNN(5, return_sequences=True, go_backwards=True),
            layers.Dense(3),
        ]
    )
    return trained(par, model, x, y, "mse")


@program("stateful LSTM over batches")
def stateful_lstm(par: Par) -> Any:
    r = np.random.RandomState(0)
    x, y = r.rand(24, 4, 3).astype("float32"), r.rand(24, 2).astype("float32")
    model = keras.Sequential(
        [keras.Input((4, 3), batch_size=12), layers.LSTM(12, stateful=True), layers.Dense(2)]
    )
    return trained(par, model, x, y, "mse")


@program("ConvLSTM2D")
def conv_lstm(par: Par) -> Any:
    r = np.random.RandomState(0)
    x, y = r.rand(10, 3, 6, 6, 2).astype("float32"), r.randint(0, 4, 10)
    model = keras.Sequential(
        [layers.ConvLSTM2D(4, 3, padding="same"), layers.GlobalAveragePooling2D(), layers.Dense(4)]
    )
    return trained(par, model, x, y, batch_size=4)


class Position(layers.Layer):
    def build(self, shape: Any) -> None:
        self.table = self.add_weight(shape=shape[1:], name="table")

    def call(self, x: Any) -> Any:
        return x + self.table


def block(x: Any, width: int, attention: Any, **how: Any) -> Any:
    h = layers.LayerNormalization()(x)
    x = x + attention(h, h, **how)
    h = layers.LayerNormalization()(x)
    return x + layers.Dense(width)(layers.Dense(4 * width, activation="gelu")(h))


@program("GPT-like: causal attention, positions, next-token loss")
def gpt(par: Par) -> Any:
    x, _ = tokens()
    i = keras.Input((8,), dtype="int32")
    h = Position()(layers.Embedding(24, 16)(i))
    for _ in range(2):
        h = block(h, 16, layers.MultiHeadAttention(4, 4, dropout=0.1, seed=2), use_causal_mask=True)
    model = keras.Model(i, layers.Dense(24)(layers.LayerNormalization()(h)))
    return trained(par, model, x, np.roll(x, -1, axis=1))


@program("grouped-query attention with a padding mask, RMS normalisation")
def grouped_query(par: Par) -> Any:
    x, y = tokens()
    x[:, 6:] = 0
    i = keras.Input((8,), dtype="int32")
    h = layers.Embedding(24, 16)(i)
    mask = layers.Lambda(lambda t: (t != 0)[:, None, :] & (t != 0)[:, :, None])(i)
    h = layers.RMSNormalization()(
        h + layers.GroupQueryAttention(4, 4, 2)(h, h, attention_mask=mask)
    )
    return trained(par, keras.Model(i, layers.Dense(4)(layers.GlobalMaxPooling1D()(h))), x, y)


@program("Attention and AdditiveAttention layers")
def plain_attention(par: Par) -> Any:
    x, y = tokens()
    i = keras.Input((8,), dtype="int32")
    h = layers.Embedding(24, 8)(i)
    h = layers.Concatenate()(
        [layers.Attention(use_scale=True)([h, h]), layers.AdditiveAttention()([h, h])]
    )
    return trained(par, keras.Model(i, layers.Dense(4)(layers.GlobalAveragePooling1D()(h))), x, y)


@program("Conv1D: causal, dilated, strided; pooling in one dim")
def conv1d(par: Par) -> Any:
    r = np.random.RandomState(0)
    x, y = r.rand(26, 16, 3).astype("float32"), r.randint(0, 4, 26)
    model = keras.Sequential(
        [
            layers.Conv1D(8, 3, padding="causal", dilation_rate=2, activation="relu"),
            layers.Conv1D(8, 4, strides=2, padding="same"),
            layers.MaxPooling1D(2),
            layers.AveragePooling1D(2),
            layers.Conv1DTranspose(4, 3, strides=2),
            layers.Flatten(),
            layers.Dense(4),
        ]
    )
    return trained(par, model, x, y)


@program("Conv2D with batch normalisation, pooling, dropout")
def cnn(par: Par) -> Any:
    model = keras.Sequential(
        [
            layers.Conv2D(8, 3, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.MaxPool2D(),
            layers.Conv2D(8, 3, strides=2, padding="same", activation="silu"),
            layers.SpatialDropout2D(0.2, seed=1),
            layers.AveragePooling2D(2),
            layers.Flatten(),
            layers.Dense(4),
        ]
    )
    return trained(par, model, *images(), metrics=["accuracy"])


@program("Conv3D, pooling in three dims, transposed")
def conv3d(par: Par) -> Any:
    r = np.random.RandomState(0)
    x, y = r.rand(10, 4, 6, 6, 2).astype("float32"), r.randint(0, 4, 10)
    model = keras.Sequential(
        [
            layers.Conv3D(4, 3, padding="same", activation="relu"),
            layers.MaxPooling3D(2),
            layers.Conv3DTranspose(3, 2, strides=2),
            layers.GlobalMaxPooling3D(),
            layers.Dense(4),
        ]
    )
    return trained(par, model, x, y, batch_size=4)


@program("depthwise and separable convolutions in one and two dims")
def separable(par: Par) -> Any:
    i = keras.Input((8, 8, 4))
    h = layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2)(i)
    h = layers.SeparableConv2D(6, 3, padding="same", activation="relu")(h)
    h = layers.Reshape((64, 6))(h)
    h = layers.SeparableConv1D(5, 3)(layers.DepthwiseConv1D(3)(h))
    return trained(
        par,
        keras.Model(i, layers.Dense(4)(layers.GlobalAveragePooling1D()(h))),
        *images(channels=4),
    )


@program("grouped, dilated and transposed convolutions (a small U-Net)")
def unet(par: Par) -> Any:
    x, _ = images(channels=4)
    i = keras.Input((8, 8, 4))
    a = layers.Conv2D(8, 3, padding="same", groups=2, activation="relu")(i)
    b = layers.Conv2D(8, 3, strides=2, padding="same")(a)
    b = layers.Conv2D(8, 3, dilation_rate=2, padding="same", activation="relu")(b)
    b = layers.Conv2DTranspose(8, 3, strides=2, padding="same")(b)
    model = keras.Model(i, layers.Conv2D(1, 1)(layers.Concatenate()([a, b])))
    return trained(par, model, x, x[..., :1], "mse")


@program("residual network with strided shortcuts")
def resnet(par: Par) -> Any:
    i = keras.Input((8, 8, 3))
    h = layers.Conv2D(8, 3, padding="same")(i)
    for width, stride in ((8, 1), (16, 2)):
        short = h if stride == 1 else layers.Conv2D(width, 1, strides=stride)(h)
        h = layers.BatchNormalization()(layers.Conv2D(width, 3, strides=stride, padding="same")(h))
        h = layers.Conv2D(width, 3, padding="same")(layers.ReLU()(h))
        h = layers.ReLU()(layers.Add()([h, short]))
    return trained(
        par, keras.Model(i, layers.Dense(4)(layers.GlobalAveragePooling2D()(h))), *images()
    )


@program("every normalisation layer")
def normalisations(par: Par) -> Any:
    i = keras.Input((8, 8, 4))
    h = layers.GroupNormalization(2)(layers.Conv2D(4, 3)(i))
    h = layers.LayerNormalization(axis=(1, 2, 3))(h)
    h = layers.SpectralNormalization(layers.Conv2D(6, 3))(h)
    h = layers.BatchNormalization(renorm=False, momentum=0.8)(h)
    h = layers.UnitNormalization()(layers.Flatten()(h))
    h = layers.RMSNormalization()(layers.Dense(8)(h))
    return trained(par, keras.Model(i, layers.Dense(4)(h)), *images(channels=4))


@program("every layer with noise: dropouts, Gaussian noise and dropout, alpha dropout")
def noise(par: Par) -> Any:
    i = keras.Input((8, 8, 4))
    h = layers.GaussianNoise(0.1, seed=1)(i)
    h = layers.SpatialDropout2D(0.2, seed=2)(layers.Conv2D(4, 3)(h))
    h = layers.SpatialDropout1D(0.2, seed=3)(layers.Reshape((36, 4))(h))
    h = layers.AlphaDropout(0.1, seed=4)(layers.Dense(8, activation="selu")(layers.Flatten()(h)))
    h = layers.GaussianDropout(0.1, seed=5)(layers.Dropout(0.2, seed=6)(h))
    return trained(par, keras.Model(i, layers.Dense(4)(h)), *images(channels=4))


@program("preprocessing inside the model: rescaling, normalisation, random flips and zooms")
def preprocessing(par: Par) -> Any:
    x, y = images()
    normal = layers.Normalization()
    normal.adapt(x)
    model = keras.Sequential(
        [
            layers.Rescaling(2.0, -1.0),
            normal,
            layers.RandomFlip(seed=1),
            layers.RandomTranslation(0.1, 0.1, seed=2),
            layers.CenterCrop(6, 6),
            layers.Resizing(4, 4),
            layers.Flatten(),
            layers.Dense(4),
        ]
    )
    return trained(par, model, x, y)


@program("categorical columns: encodings, discretisation, crossing, one embedding each")
def columns(par: Par) -> Any:
    x, y = vectors()
    kinds = np.random.RandomState(0).randint(0, 6, (26, 1)).astype("int32")
    a, b = keras.Input((12,), name="numbers"), keras.Input((1,), dtype="int32", name="kinds")
    h = layers.Concatenate()(
        [
            a,
            layers.CategoryEncoding(6, output_mode="one_hot")(b),
            layers.Flatten()(layers.Embedding(6, 3)(b)),
        ]
    )
    model = keras.Model([a, b], layers.Dense(4)(layers.Dense(8, activation="relu")(h)))
    return trained(par, model, [x, kinds], y)


@program("layers without computation: padding, cropping, upsampling, permuting")
def shape_layers(par: Par) -> Any:
    i = keras.Input((8, 8, 3))
    h = layers.Cropping2D(1)(layers.ZeroPadding2D(2)(layers.Conv2D(4, 3)(i)))
    h = layers.UpSampling2D(2, interpolation="bilinear")(h)
    h = layers.Permute((2, 1, 3))(layers.AveragePooling2D(2)(h))
    h = layers.UpSampling1D(2)(layers.Reshape((16, -1))(h))
    h = layers.Cropping1D(1)(layers.ZeroPadding1D(1)(h))
    return trained(
        par, keras.Model(i, layers.Dense(4)(layers.GlobalAveragePooling1D()(h))), *images()
    )


@program("merging layers and activations with weights")
def merging(par: Par) -> Any:
    i = keras.Input((12,))
    a, b = layers.Dense(8)(i), layers.Dense(8, activation="softmax")(i)
    h = layers.Maximum()([layers.PReLU()(a), layers.ELU()(b)]) * layers.Average()([a, b])
    h = layers.Subtract()([layers.LeakyReLU()(h), layers.Minimum()([a, layers.Softmax()(b)])])
    return trained(par, keras.Model(i, layers.Dense(4)(layers.Multiply()([h, a]))), *vectors())


class Experts(layers.Layer):
    """Four experts, all computed, mixed by a softmax gate: the expert dim is a batch dim of its
    product.
    """

    def build(self, shape: Any) -> None:
        self.up = self.add_weight(shape=(4, shape[-1], 16), initializer="glorot_uniform", name="up")
        self.down = self.add_weight(
            shape=(4, 16, shape[-1]), initializer="glorot_uniform", name="down"
        )
        self.gate = self.add_weight(shape=(shape[-1], 4), initializer="glorot_uniform", name="gate")

    def call(self, x: Any) -> Any:
        h = ops.relu(ops.einsum("bd,edf->ebf", x, self.up))
        out = ops.einsum("ebf,efd->ebd", h, self.down)
        return ops.einsum("ebd,be->bd", out, ops.softmax(x @ self.gate))


@program("mixture of experts, a custom layer")
def experts(par: Par) -> Any:
    return trained(par, keras.Sequential([layers.Dense(8), Experts(), layers.Dense(4)]), *vectors())


@program("EinsumDense, Lambda, keras.ops on symbolic tensors")
def einsum_and_ops(par: Par) -> Any:
    i = keras.Input((8, 8, 3))
    h = layers.EinsumDense("bhwc,cde->bhwde", output_shape=(None, None, 4, 2), bias_axes="de")(i)
    h = ops.mean(ops.sin(h), axis=(1, 2))
    h = layers.Lambda(lambda t: ops.cumsum(ops.sort(t, axis=1), axis=1))(h)
    return trained(par, keras.Model(i, layers.Dense(4)(layers.Flatten()(h))), *images())


@program("two-tower recommender with large embeddings and in-batch negatives")
def two_towers(par: Par) -> Any:
    r = np.random.RandomState(0)
    users, items = r.randint(0, 64, (24, 1)), r.randint(0, 48, (24, 3))
    u, v = keras.Input((1,), dtype="int32"), keras.Input((3,), dtype="int32")
    a = layers.Dense(8)(layers.Flatten()(layers.Embedding(64, 16)(u)))
    b = layers.Dense(8)(layers.GlobalAveragePooling1D()(layers.Embedding(48, 16)(v)))
    model = keras.Model([u, v], ops.matmul(a, ops.transpose(b)))
    labels = np.tile(np.arange(12), 2)
    model.compile("sgd", SPARSE)
    model = par(model)
    return model.fit(
        [users, items], labels, batch_size=12, epochs=2, verbose=0, shuffle=False
    ).history, model.get_weights()


@program("autoencoder with upsampling and binary cross-entropy")
def autoencoder(par: Par) -> Any:
    x, _ = images(channels=1)
    model = keras.Sequential(
        [
            layers.Conv2D(6, 3, strides=2, padding="same", activation="relu"),
            layers.UpSampling2D(),
            layers.Conv2D(1, 3, padding="same", activation="sigmoid"),
        ]
    )
    return trained(par, model, x, x, "binary_crossentropy")


@program("CTC loss over sequences")
def ctc(par: Par) -> Any:
    r = np.random.RandomState(0)
    x, y = r.rand(10, 12, 4).astype("float32"), r.randint(1, 6, (10, 3)).astype("int32")
    model = keras.Sequential([layers.LSTM(8, return_sequences=True), layers.Dense(6)])
    return trained(par, model, x, y, keras.losses.CTC(), batch_size=4)
