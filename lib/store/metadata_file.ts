import { join } from 'node:path';
import { corrupt, type Disk } from './disk.ts';
import { BadMetadata, decode, encode, type Metadata } from './metadata.ts';

const NAMES = ['metadata.0', 'metadata.1'] as const;
/** A million private ranges are 16 MB. What is larger than this nobody wrote. */
const LARGEST = 2 ** 30;
const ATTEMPTS = 3;

/**
 * The two copies of a memory's metadata. An update overwrites the older one, and syncs it before it is believed: whatever interrupts that, the
 * other one is whole.
 */
export class MetadataFile {
  readonly #disk: Disk;
  readonly #folder: string;
  #next: { readonly copy: 0 | 1; readonly sequence: bigint } = { copy: 0, sequence: 1n };

  constructor(disk: Disk, folder: string) {
    this.#disk = disk;
    this.#folder = folder;
  }

  /** @throws KvmError `ERR_CORRUPT` neither copy is whole */
  read(): Metadata {
    let reasons: string[] = [];
    // A reader may come twice while one copy, and then the other, is being written.
    for (let attempt = 0; attempt < ATTEMPTS; attempt++) {
      reasons = [];
      const copies = ([0, 1] as const).flatMap((copy) => this.#copy(copy, reasons));
      const best = copies.sort((a, b) => (a.sequence < b.sequence ? 1 : -1))[0];
      if (!best) continue;
      this.#next = { copy: best.copy ? 0 : 1, sequence: best.sequence + 1n };
      return best.metadata;
    }
    throw corrupt(`${this.#folder} has no metadata that can be read (${reasons.join('; ')})`);
  }

  #copy(copy: 0 | 1, reasons: string[]) {
    try {
      return [{ copy, ...decode(this.#disk.read(join(this.#folder, NAMES[copy]), LARGEST)) }];
    } catch (error) {
      const { code } = error as NodeJS.ErrnoException;
      const isBad = error instanceof BadMetadata || code === 'ENOENT' || code === 'ERR_CORRUPT';
      if (!isBad) throw error;
      reasons.push(`${NAMES[copy]}: ${(error as Error).message}`);
      return [];
    }
  }

  /** @throws KvmError of the system calls behind it; what was there before is still there. */
  write(metadata: Metadata): void {
    const { copy, sequence } = this.#next;
    this.#disk.write(join(this.#folder, NAMES[copy]), encode(metadata, sequence));
    this.#next = { copy: copy ? 0 : 1, sequence: sequence + 1n };
  }
}
