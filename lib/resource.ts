import { KvmError } from './errors.ts';
import type { Kernel } from './kernel/kernel.ts';
import { typeError } from './validate.ts';

/** What only the classes of this package may hand to a constructor. */
export const internal: unique symbol = Symbol('guest-memfd');

export function guardConstructor(token: unknown, instead: string): void {
  if (token !== internal) throw typeError(`Illegal constructor: use ${instead}`);
}

interface Net {
  readonly what: string;
  readonly release: () => void;
  readonly forget: () => void;
}

/**
 * A release that closes an fd. It is made here because a closure made in a constructor shares its context with the others made there, and
 * with them would keep the object alive; and it knows the kernel weakly, because a software kernel is gone when nobody has it any more.
 */
export function closing(kernel: Kernel, fd: number): () => void {
  const weak = new WeakRef(kernel);
  return () => weak.deref()?.close(fd);
}

/** Closes what was dropped without close(): a safety net, not a way of life. */
const net = new FinalizationRegistry<Net>(({ what, release, forget }) => {
  forget();
  release();
  process.emitWarning(`${what} was garbage-collected without close(); it is closed now`, { code: 'GUEST_MEMFD_LEAK' });
});

/**
 * Something of the kernel that is ours until it is closed. Owners know their resources weakly and close them first; a resource keeps
 * its owner alive.
 */
export abstract class Resource implements Disposable {
  readonly #what: string;
  readonly #release: () => void;
  readonly #forget: () => void;
  readonly #children = new Set<WeakRef<Resource>>();
  #closed = false;

  /**
   * @param what As messages name it.
   * @param release Gives it back to the kernel. It must not refer to the object, or the object would never be collected: see closing().
   */
  protected constructor(owner: Resource | null, what: string, release: () => void) {
    this.#what = what;
    this.#release = release;
    const siblings = owner ? owner.#children : null;
    const self = new WeakRef<Resource>(this);
    siblings?.add(self);
    this.#forget = () => siblings?.delete(self);
    net.register(this, { what, release, forget: this.#forget }, this);
  }

  get closed(): boolean {
    return this.#closed;
  }

  /** Closes what it owns, then itself. A second call does nothing. */
  close(): void {
    if (this.#closed) return;
    const children = [...this.#children].flatMap((child) => child.deref() ?? []);
    for (const child of children.filter((child) => child.usesOthers)) child.closeWithOwner();
    for (const child of children) child.closeWithOwner();
    this.#closed = true;
    net.unregister(this);
    this.#forget();
    this.#release();
  }

  [Symbol.dispose](): void {
    this.close();
  }

  /** Whether it uses what else its owner has, so that it has to go first. */
  protected get usesOthers(): boolean {
    return false;
  }

  /** A close that cannot be refused, because the owner goes as well. */
  protected closeWithOwner(): void {
    this.close();
  }

  /** @throws KvmError `ERR_CLOSED` */
  protected assertOpen(): void {
    if (this.#closed) throw KvmError.closed(this.#what);
  }
}
