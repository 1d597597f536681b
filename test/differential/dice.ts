import type { Random } from 'fast-check';
import type { Fd, Host, Num } from './program.ts';

/** Random choices, weighted towards what calls are refused for. */
export class Dice {
  readonly #random: Random;

  constructor(random: Random) {
    this.#random = random;
  }

  /** 0 ≤ n < count. */
  below(count: number): number {
    return this.#random.nextInt(0, count - 1);
  }

  chance(percent: number): boolean {
    return this.below(100) < percent;
  }

  of<T>(values: readonly T[]): T {
    return values[this.below(values.length)] as T;
  }

  /** One of the values, as often as its weight says. */
  weighted<T>(choices: readonly (readonly [weight: number, value: T])[]): T {
    let left = this.below(choices.reduce((sum, [weight]) => sum + weight, 0));
    for (const [weight, value] of choices) {
      left -= weight;
      if (left < 0) return value;
    }
    return (choices.at(-1) as readonly [number, T])[1];
  }

  /** Usually of the kind the call wants, and among the first few of it. */
  fd(kind: 'kvm' | 'vm' | 'file' | 'vcpu', sureness = 96): Fd {
    const wanted = this.chance(sureness) ? kind : this.of(['kvm', 'vm', 'file', 'vcpu', 'none'] as const);
    if (wanted === 'kvm' || wanted === 'none') return wanted;
    return `${wanted}${
      wanted === 'vm'
        ? this.weighted([
            [8, 0],
            [2, 1],
            [1, 2],
          ])
        : this.below(5)
    }`;
  }

  /** A page number among so few that requests meet each other. */
  page(): number {
    return this.weighted([
      [16, this.below(8)],
      [6, this.below(16)],
      [1, this.below(80)],
    ]);
  }

  /** A size in pages; now and then enough for more than one word of dirty bitmap. */
  pages(): number {
    return this.weighted([
      [12, 1 + this.below(4)],
      [4, 1 + this.below(8)],
      [1, 60 + this.below(80)],
    ]);
  }

  address(): Num {
    return this.chance(88) ? this.page() : this.edge();
  }

  size(): Num {
    return this.chance(90) ? this.pages() : this.edge();
  }

  edge(): Num {
    return this.weighted<Num>([
      [3, ['0', this.below(6), this.of([1, -1, 8, 512, 2048])]],
      [2, 0],
      [2, ['2^64', -1 - this.below(4)]],
      [1, ['2^64', 0, -1]],
      [2, ['2^63', this.below(7) - 3]],
      [1, ['2^63', 0, -1]],
      [3, ['limit', this.below(7) - 5]],
      [1, ['2^52', this.below(3) - 2]],
      [2, ['task', this.below(6) - 4]],
      [2, ['slot', this.below(4) - 1]],
      [1, ['2^32', this.below(3) - 1]],
      [1, ['2^31', this.below(3) - 1]],
      [1, ['file', this.below(3) - 1]],
    ]);
  }

  /** The host memory of a slot: by its number, so that a second request for the slot finds it the same. */
  host(slot: number): Host {
    return this.weighted<Host>([
      [14, { mapping: slot % 4, page: 0 }],
      [2, { mapping: this.below(4), page: this.below(4) }],
      [3, 0],
      [
        1,
        this.of<Num>([
          ['0', 0, 1],
          ['0', 3, 4],
          ['task', -1],
          ['task', 0],
          ['task', -3],
          ['2^63', 0],
          ['2^64', -1],
          ['2^52', 0],
        ]),
      ],
    ]);
  }

  slot(): number {
    return this.chance(95)
      ? this.below(5)
      : this.of([6, 7, 30, 32, 100, 509, 32763, 32764, 32766, 32767, 32768, 65535]);
  }

  space(): number {
    return this.chance(94) ? 0 : this.of([1, 1, 1, 2, 3, 0x7fff, 0xffff]);
  }
}
