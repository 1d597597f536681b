import { some } from '../pace.ts';

/** Values that no argument of this package can be, or that lie about what they are. A function makes each anew. */

export class Mine extends Error {}

function thrower(): never {
  throw new Mine('thrown by the caller’s own code');
}

class Liar extends Uint8Array {
  override get length(): number {
    return 1_000_000;
  }
  override get byteLength(): number {
    return 1_000_000;
  }
  override subarray(): Uint8Array<ArrayBuffer> {
    return thrower();
  }
}

export function detached(): Uint8Array {
  const bytes = new Uint8Array(64);
  structuredClone(bytes, { transfer: [bytes.buffer] });
  return bytes;
}

function shrunk(): Uint8Array {
  const Resizable = ArrayBuffer as unknown as new (
    size: number,
    options: object,
  ) => ArrayBuffer & { resize(size: number): void };
  const buffer = new Resizable(64, { maxByteLength: 64 });
  const bytes = new Uint8Array(buffer, 32, 32);
  buffer.resize(8);
  return bytes;
}

/** Numbers and everything else that is no object. */
export const scalars: Readonly<Record<string, () => unknown>> = {
  NaN: () => Number.NaN,
  '-1': () => -1,
  '-0': () => -0,
  '2^53': () => 2 ** 53,
  '2^53-1': () => Number.MAX_SAFE_INTEGER,
  '1.5': () => 1.5,
  Infinity: () => Number.POSITIVE_INFINITY,
  '-Infinity': () => Number.NEGATIVE_INFINITY,
  '1e300': () => 1e300,
  '5e-324': () => 5e-324,
  '2^31': () => 2 ** 31,
  '2^32': () => 2 ** 32,
  '12345': () => 12345,
  "''": () => '',
  "'1'": () => '1',
  'a NUL': () => 'a\0b',
  'a long string': () => 'x'.repeat(1 << 20),
  null: () => null,
  undefined: () => undefined,
  true: () => true,
  symbol: () => Symbol('bad'),
  '0n': () => 0n,
  '2^64': () => 1n << 64n,
  '2^64-1': () => (1n << 64n) - 1n,
  '-2^63': () => -(1n << 63n),
  '2^1000': () => 1n << 1000n,
};

export const objects: Readonly<Record<string, () => unknown>> = {
  '{}': () => ({}),
  '[]': () => [],
  'a huge array': () => new Array(2 ** 32 - 1),
  'a function': () => () => 1,
  'a class': () => class {},
  'no prototype': () => Object.create(null),
  'throwing valueOf': () => ({ valueOf: thrower, toString: thrower, [Symbol.toPrimitive]: thrower }),
  'valueOf 0': () => ({ valueOf: () => 0, toString: () => '0' }),
  toJSON: () => ({ toJSON: thrower }),
  'throwing Proxy': () =>
    new Proxy(
      {},
      { get: thrower, has: thrower, ownKeys: thrower, getPrototypeOf: thrower, getOwnPropertyDescriptor: thrower },
    ),
  'revoked Proxy': () => {
    const { proxy, revoke } = Proxy.revocable({}, {});
    revoke();
    return proxy;
  },
  'throwing getters': () =>
    Object.defineProperties(
      {},
      Object.fromEntries(
        ['address', 'size', 'offset', 'private', 'slot', 'type', 'kind', 'backend', 'then'].map((name) => [
          name,
          { get: thrower },
        ]),
      ),
    ),
  'endless iterable': () => ({ [Symbol.iterator]: () => ({ next: thrower }) }),
  Number: () => new Number(4096),
  Date: () => new Date(0),
  Map: () => new Map([['address', 0]]),
  Promise: () => Promise.resolve(0),
  AbortSignal: () => Object.create(AbortSignal.prototype),
  ArrayBuffer: () => new ArrayBuffer(64),
  DataView: () => new DataView(new ArrayBuffer(64)),
  Uint16Array: () => new Uint16Array(64),
  'empty Uint8Array': () => new Uint8Array(0),
  Uint8Array: () => new Uint8Array(64),
  'detached Uint8Array': detached,
  'shared Uint8Array': () => new Uint8Array(new SharedArrayBuffer(64)),
  'shrunk Uint8Array': shrunk,
  'lying subclass': () => new Liar(8),
  'lying property': () => Object.defineProperty(new Uint8Array(8), 'length', { value: 1_000_000 }),
  'Object.create(Uint8Array.prototype)': () => Object.create(Uint8Array.prototype),
  'Proxy of a Uint8Array': () => new Proxy(new Uint8Array(64), {}),
};

export const all: Readonly<Record<string, () => unknown>> = Object.fromEntries(
  some(Object.entries({ ...scalars, ...objects }), 30),
);
