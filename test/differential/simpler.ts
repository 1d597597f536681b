import type { Step } from './program.ts';

/** Steps that say less than this one, the least first: how a counterexample shrinks. */
export function* simpler(step: Step): Generator<Step> {
  for (const [name, value] of Object.entries(step)) {
    if (name === 'call') continue;
    for (const smaller of simplerValues(value)) yield { ...step, [name]: smaller } as Step;
  }
}

function* simplerValues(value: unknown): Generator<unknown> {
  if (typeof value === 'number' && value !== 0) {
    yield 0;
    if (Math.abs(value) > 1) yield Math.trunc(value / 2);
    if (value > 1) yield value - 1;
  } else if (typeof value === 'string') {
    const [, kind, index] = /^([a-z]+)(\d+)$/.exec(value) ?? [];
    if (Number(index) > 0) yield `${kind}0`;
    if (Number(index) > 1) yield `${kind}${Number(index) - 1}`;
  } else if (Array.isArray(value)) {
    const [base, pages, bytes] = value;
    if (base === '0' && !bytes) yield pages;
    if (bytes) yield [base, pages];
    if (pages) yield bytes ? [base, 0, bytes] : [base, 0];
  } else if (typeof value === 'object' && value !== null && 'mapping' in value && 'page' in value) {
    yield 0;
    if (value.page !== 0) yield { ...value, page: 0 };
    if (Number(value.mapping) > 0) yield { ...value, mapping: Number(value.mapping) - 1 };
  }
}
