"""The text of the page about FP4 and INT4, with fields for what is computed and measured."""

TEMPLATE = """\
# FP4 or INT4

<!-- `python -m benchmarks.bench_formats` writes this page from what it computes and measures. Its
text is in benchmarks/format_page.py and format_sentences.py. -->

Which 4-bit format of weights has the least error depends on two things: how long the tails of the
weights are, and how many weights share a scale. This page has the ratio of signal to noise of
each format against both, computed exactly, and places the layers of the models that are at hand
on it.

## The answer

A float spends its codes near zero, and an integer spends them evenly. The scale follows the
largest value of a block. With few values or light tails, the largest value is not much larger
than the others, and even steps are right. With many values or long tails, most values are small
beside it, and the steps near zero decide.

{answer}

![By how many dB E2M1 exceeds INT4, by kurtosis and size of blocks](../assets/fp4-or-int4.svg)

Lines are computed: solid for the generalised normal distribution, dashed for Student's t. A dot
is a layer of {models}, with the kurtosis within its blocks, for blocks of 16 and of 128, in the
color of the line.

## All formats

![Signal to noise of all formats against the kurtosis](../assets/4-bit-formats.svg)

Signal to noise in dB of independent values, rounded to nearest under the absmax of the block, or
under its least and largest value with a zero point. The best of a column is bold for each
distribution.

{distributions}

With an fp16 scale for each block these formats take {bits} bits per weight for 16, 32, 64 and 128
values; a zero point adds 4 bits to a block. These are formats with 8-bit scales of short blocks,
whose size is part of them:

{blocks}

Powers of two as scales (MXFP4) are averaged over an octave of the standard deviation. IF4
(arXiv:2603.28765) takes E2M1 or INT4 for each block of 16, whichever has the lesser error, and
keeps the choice in the sign of the scale. IF4 is sampled; all others are integrated.

## Where a float passes an integer

This is the excess kurtosis within a block from which on the first format is ahead. "Always" and
"never" hold for all that was computed: from {lightest:.1f} (a uniform distribution) to
{heaviest:.0f} for the generalised normal distribution, and from 0 to {heaviest:.0f} for Student's
t.

{crossings}

## The layers at hand

{layers}

## What a Hadamard rotation does

A rotation of whole rows makes each value a sum of many, and thus closer to normal, whatever the
values were. Long tails become shorter, and light tails longer.

{rotation}

## FP4DiT's paper

FP4DiT (arXiv:2503.15465) reports better scores of images than INT4 methods have at W4A8 and W4A6,
on PixArt-alpha, PixArt-Sigma and HunyuanDiT. The INT4 weights of its code have a zero point and
groups of 128, as its FP4 weights have groups of 128. On [the shipped model](../results/demo.md)
INT4 with a zero point is better.

{paper}

## How it was computed

This command writes the page and both figures, in about two minutes on one core:

```sh
python -m benchmarks.bench_formats
python -m benchmarks.bench_formats --model /my/pixart --model /my/hunyuan
```

The second one also places the layers of other models whose weights are on this machine. Of layers
with more than {limit:,} values it reads evenly spaced rows, whose largest value then stands for
that of the tensor.

Given the largest magnitude of a block, the other values are independent and truncated to it, and
the scale is known. Between two midpoints of levels, the squared error is then a difference of
partial moments, which have closed forms. What is left is an integral over the largest magnitude,
or over the least and the largest value with a zero point, or over the largest magnitude of the
tensor as well for NVFP4. The code is `fp4dit/analysis/expected_noise.py`. `tests/analysis`
compares it with the quantizers of Max and Lloyd, with closed forms for uniform values, with the
error of MXFP4 that Quartet publishes, and with samples that the project's own quantizers round:
these agree within four standard errors.

The kurtosis of a layer is about zero, of values divided by the root mean square of their block,
and corrected so that normal values have 0 for any size of blocks. The ratio of a layer is that of
the sums of squares of all its values.

`fp4dit inspect` measures a sample of the weights in the same way, and forecasts which format wins
with the blocks of a method ([your first checkpoint](../getting-started/first-checkpoint.md)).

The error of a weight is not the error of an image. Rounding that is learned or compensated, as by
AdaRound and GPTQ, lowers the error of the output with every format, and the inputs weigh the
errors of some columns more than those of others. [Number
formats](number-formats.md#which-one-to-choose) has scores of images for the same formats.

## Every layer

Signal to noise in dB; g128 stands for groups of 128. Layers whose rows 128 does not divide are
left out.

{every}
"""
