/** Guest physical range, in bytes; page-aligned where it reaches the kernel. */
export interface GuestRange {
  readonly address: number;
  readonly size: number;
}

/** Byte range of a file or mapping. */
export interface FileRange {
  readonly offset: number;
  readonly size: number;
}

export type Visibility = 'private' | 'shared';
